"""Training in JAX: jit, ``lax.scan`` over the epoch, optax. Started by ``scripts/bench.py``.

    python -m venv jax-env
    jax-env/bin/pip install jax optax

For a GPU install ``jax[cuda13]``, or what fits its driver, in place of ``jax``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from worker import CLOCKS, Measure, serve

LOG_2PI = float(np.log(2 * np.pi))


def initial_parameters(widths: list[int], key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Weights and biases of a fully connected network."""
    keys = jax.random.split(key, len(widths) - 1)
    initializer = jax.nn.initializers.glorot_uniform()
    return [
        (initializer(k, (inputs, outputs)), jnp.zeros(outputs))
        for k, inputs, outputs in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def network(parameters: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """Tanh layers, the last one linear."""
    *hidden, (weight, bias) = parameters
    for w, b in hidden:
        x = jnp.tanh(x @ w + b)
    return x @ weight + bias


def loss(
    parameters: dict[str, Any], images: jax.Array, key: jax.Array, bound: str, num_samples: int
) -> jax.Array:
    """Minus the ELBO with its KL in closed form, or minus the importance-weighted bound."""
    mean, raw = jnp.split(network(parameters["encoder"], images), 2, axis=-1)
    std = jax.nn.softplus(raw) + 1e-6
    noise = jax.random.normal(key, (num_samples, *mean.shape))
    z = mean + std * noise
    logits = network(parameters["decoder"], z)
    log_likelihood = (images * logits - jax.nn.softplus(logits)).sum(-1)
    if bound == "elbo":
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * jnp.log(std)).sum(-1)
        return (kl - log_likelihood.mean(0)).mean()
    log_prior = -0.5 * (z**2).sum(-1)
    log_q = -0.5 * (noise**2).sum(-1) - jnp.log(std).sum(-1)
    log_weights = log_likelihood + log_prior - log_q
    return -(jax.nn.logsumexp(log_weights, axis=0) - jnp.log(num_samples)).mean()


def prepare(settings: dict[str, Any]) -> Callable[[str, int], Measure]:
    """Put the images on the device."""
    host_images = np.load(settings["images"])
    images = jnp.asarray(host_images)
    clock = CLOCKS[settings["clock"]]
    pixels, latent_dim, hidden = images.shape[1], settings["latent_dim"], settings["hidden"]
    batch_size = settings["batch_size"]
    optimizer = optax.adam(1e-3)

    def training_of(bound: str, num_samples: int) -> Measure:
        encoder_key, decoder_key, noise_key = jax.random.split(jax.random.key(0), 3)
        parameters = {
            "encoder": initial_parameters([pixels, *hidden, 2 * latent_dim], encoder_key),
            "decoder": initial_parameters([latent_dim, *reversed(hidden), pixels], decoder_key),
        }
        state = parameters, optimizer.init(parameters), noise_key
        gradient = jax.grad(functools.partial(loss, bound=bound, num_samples=num_samples))

        def step(state: Any, rows: jax.Array) -> tuple[Any, None]:
            parameters, momenta, key = state
            key, noise_key = jax.random.split(key)
            batch = images[rows].astype(jnp.float32)
            updates, momenta = optimizer.update(gradient(parameters, batch, noise_key), momenta)
            return (optax.apply_updates(parameters, updates), momenta, key), None

        @functools.partial(jax.jit, donate_argnums=0)
        def scan(state: Any, order: jax.Array) -> Any:
            return jax.lax.scan(step, state, order)[0]

        shuffle = np.random.default_rng(0)

        def train(steps: int) -> None:
            nonlocal state
            order = shuffle.permutation(len(host_images))[: steps * batch_size]
            state = jax.block_until_ready(scan(state, order.reshape(steps, batch_size)))

        whole_epoch = len(host_images) // batch_size
        steps = 0

        def measure(seconds: float) -> tuple[int, float]:
            nonlocal steps
            if not steps:
                # The scan is over the epoch, or over as much of it as fits into the seconds.
                few = min(10, whole_epoch)
                train(few)
                start = clock()
                train(few)
                steps = min(max(1, int(seconds / (clock() - start) * few)), whole_epoch)
                train(steps)
            done, start = 0, clock()
            while clock() - start < seconds / 2:  # to the nearest number of scans
                train(steps)
                done += steps * batch_size
            return done, clock() - start

        return measure

    return training_of


if __name__ == "__main__":
    # The faster of JAX's generators.
    jax.config.update("jax_default_prng_impl", "rbg")
    packages = {"jax": jax.__version__, "optax": optax.__version__}
    serve(packages | {"device": jax.devices()[0].device_kind}, prepare)
