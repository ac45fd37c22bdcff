"""The random numbers of a call, handed to the literal algorithm in the order in which it asks.

The fast code of ``isir`` draws and evaluates the samples of many steps at once: those of X's start,
of the steps one after another, and of Y's start in its first call; of some more steps in each later
one. :func:`head` and :func:`block` are the rule of how many. A game of roulette draws where
the pair is at an end.
"""

import torch

from chains.toy import row
from ucvae.chains import horizon, isir, moves
from ucvae.chains.kernels import StepNoise, draw_noise

CPU = torch.device("cpu")


def head(lag, burn_in, max_steps):
    """Steps in the first evaluation of ``isir``."""
    return min(max(lag + 1, burn_in + lag - 1), max_steps)


def block(t, num_left, num_samples, lag, max_steps, survival=0.0):
    """Steps in an evaluation after t, where so many images are left."""
    worthwhile = max(1, isir.ROWS // ((num_samples - 1) * num_left))
    while survival and max_steps <= t:
        max_steps *= 2
    return min(worthwhile, max(1, t - lag), max_steps - t)


def spare(num_samples, dim):
    """Noise of a step whose outcome is of no account, as both chains have met before."""
    generator = torch.Generator().manual_seed(1)
    kind = dict(generator=generator, device=CPU, dtype=torch.float64)
    return row(draw_noise(1, num_samples, dim, **kind), 0)


def isir_noise(fresh, uniforms):
    """A step of ``isir``, which has no slot. Any will do: here the last."""
    return StepNoise(torch.tensor(len(fresh)), fresh, uniforms)


class ReplayIsir:
    """A call with one image, its numbers drawn again from an equal generator."""

    def __init__(self, seed, dim, num_samples, lag, burn_in, max_steps, first=None, survival=0.0):
        self.kind = dict(
            generator=torch.Generator().manual_seed(seed), device=CPU, dtype=torch.float64
        )
        self.fresh, self.dim = num_samples - 1, dim
        count = num_samples if burn_in == 0 else 1
        steps = head(lag, burn_in, max_steps)
        given = torch.empty(0, dim) if first is None else first[0][0]
        drawn = torch.randn(2 * count + steps * self.fresh - len(given), dim, **self.kind)
        x, fresh, y = torch.cat([given, drawn]).split([count, steps * self.fresh, count])
        self.starts = iter([list(x), list(y)])
        self.steps = self.dealt(fresh, steps, lag, max_steps, survival)

    def dealt(self, fresh, ahead, lag, max_steps, survival):
        t = 0
        while ahead:
            yield from map(isir_noise, fresh.split(self.fresh), torch.rand(ahead, 2, **self.kind))
            t += ahead
            ahead = self.ahead(t, 1, self.fresh + 1, lag, max_steps, survival)
            fresh = torch.randn(ahead * self.fresh, self.dim, **self.kind)

    def ahead(self, *state):
        return block(*state)

    def start(self):
        return next(self.starts)

    def draw(self):
        return next(self.steps)

    def uniform(self):
        return float(torch.rand(1, **self.kind))


class ReplayComposed:
    """The same for ``isir_disir``, which draws what it needs when it needs it."""

    def __init__(self, seed, dim, num_samples, lag, burn_in, max_steps, first=None, survival=0.0):
        self.kind = dict(generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.num_samples, self.dim = num_samples, dim
        self.count = num_samples if burn_in == 0 else 1
        # X_0 and the others of its first step; at t0 = 0 the samples of X_0.
        self.given_start = None if first is None else list(first[0][0, : self.count])
        self.given_fresh = first[0][0, self.count :] if first is not None and burn_in else None

    def start(self):
        given, self.given_start = self.given_start, None
        return given or list(torch.randn(1, self.count, self.dim, **self.kind)[0])

    def draw(self):
        noise = row(draw_noise(1, self.num_samples, self.dim, device=CPU, **self.kind), 0)
        given, self.given_fresh = self.given_fresh, None
        return noise if given is None else noise._replace(fresh=given)

    def uniform(self):
        return float(torch.rand(1, **self.kind))


REPLAYS = {"isir": ReplayIsir, "isir_disir": ReplayComposed}


class Tape:
    """Every random number of a call and every evaluation, sorted by the image that had it."""

    def __init__(self, monkeypatch, num_images, log_weight, dim, num_samples):
        self.of_call = log_weight
        self.dim, self.num_samples = dim, num_samples
        self.starts = [[] for _ in range(num_images)]
        self.steps = [[] for _ in range(num_images)]
        self.games = [[] for _ in range(num_images)]
        self.evaluations = [0] * num_images
        self.calls = 0
        self.listen(monkeypatch)
        survivors = horizon.Horizon.survivors

        def listening(table, image_index, generator):
            survives = survivors(table, image_index, generator)
            for image, survived in zip(image_index.tolist(), survives.tolist(), strict=True):
                self.games[image].append(0.0 if survived else 1.0)  # as good as the uniform
            return survives

        monkeypatch.setattr(horizon.Horizon, "survivors", listening)

    def log_weight(self, noise, image_index):
        self.calls += 1
        for image in image_index.tolist():
            self.evaluations[image] += noise.shape[1]
        self.record(noise, image_index.tolist())
        return self.of_call(noise, image_index)

    def replay(self, image):
        """What draws a start, a step, and the uniform of a game: of this image, in order.

        The literal algorithm finds by one more step that the chains are equal where the fast code
        knows it already.
        """
        starts, steps = iter(self.starts[image]), iter(self.steps[image])
        games = iter(self.games[image])
        return (
            lambda: next(starts),
            lambda: next(steps, spare(self.num_samples, self.dim)),
            lambda: next(games),
        )


class TapeIsir(Tape):
    """Uniforms are drawn once after each evaluation, for all its steps."""

    def listen(self, monkeypatch):
        rand, self.pending = torch.rand, None

        def listening(*args, **kwargs):
            uniforms = rand(*args, **kwargs)
            if self.pending is not None:
                self.deal(uniforms)
            return uniforms

        monkeypatch.setattr(torch, "rand", listening)

    def record(self, noise, images):
        self.pending = noise, images

    def deal(self, uniforms):
        (noise, images), self.pending = self.pending, None
        fresh = self.num_samples - 1
        beside = noise.shape[1] - len(uniforms) * fresh  # the samples of both starts
        assert self.calls == 1 or beside == 0
        x, of_steps, y = noise.split([beside // 2, len(uniforms) * fresh, beside // 2], 1)
        for i, image in enumerate(images):
            if beside:
                self.starts[image] = [list(x[i]), list(y[i])]
            self.steps[image] += map(isir_noise, of_steps[i].split(fresh), uniforms[:, i])


class TapeComposed(Tape):
    """A step's noise is drawn before its evaluation; a start's is not drawn as a step's."""

    def listen(self, monkeypatch):
        self.pending = None
        monkeypatch.setattr(moves, "draw_noise", self.draw_noise)

    def draw_noise(self, *args, **kwargs):
        assert self.pending is None
        self.pending = draw_noise(*args, **kwargs)
        return self.pending

    def record(self, noise, images):
        for i, image in enumerate(images):
            if self.pending is None:
                self.starts[image].append(list(noise[i]))
            else:
                self.steps[image].append(row(self.pending, i))
        self.pending = None


TAPES = {"isir": TapeIsir, "isir_disir": TapeComposed}
