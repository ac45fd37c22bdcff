"""Means over seeds along a run, and the pictures of them."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from ucvae import figures
from ucvae.figures import Curve
from ucvae.report.compare import compare
from ucvae.report.curves import _bottom, _validated, draw, over_epochs, over_seconds
from ucvae.report.runs import SECONDS, VALIDATION, find

from .folders import COUPLED, write_run


def runs_of(folder, *seeds):
    for seed, metrics in enumerate(seeds):
        write_run(folder / str(seed), {"seed": seed}, metrics)
    return [measurement.run for measurement in find([folder]).measurements]


def validations(*points):
    """Lines of metrics: epoch, seconds, value."""
    return [{"epoch": e, SECONDS: s, VALIDATION: v} for e, s, v in points]


def test_over_epochs_the_mean_is_where_all_seeds_are(tmp_path):
    one = validations((5, 1.0, -100.0), (10, 2.0, -96.0), (15, 3.0, -90.0))
    two = validations((5, 1.0, -104.0), (10, 2.0, -98.0))
    curve = over_epochs(runs_of(tmp_path, one, two), VALIDATION)
    assert curve.x.tolist() == [5, 10]
    assert curve.mean.tolist() == [-102, -97]
    # Of two values a, b the standard error is abs(a - b) / 2.
    assert curve.error == pytest.approx([2, 1])


def test_over_seconds_seeds_are_joined_by_lines(tmp_path):
    one = validations((1, 10.0, -100.0), (2, 20.0, -90.0))
    two = validations((1, 12.0, -104.0), (2, 24.0, -80.0))
    curve = over_seconds(runs_of(tmp_path, one, two))
    assert curve.x.tolist() == [12, 20]
    # At 12 s the first is at -98, at 20 s the second at -104 + 8 * 2 = -88.
    assert curve.mean == pytest.approx([-101, -89])
    assert curve.error == pytest.approx([3, 1])


def test_seeds_without_a_time_in_common_give_their_last_point(tmp_path):
    one, two = validations((1, 10.0, -100.0)), validations((1, 14.0, -90.0))
    curve = over_seconds(runs_of(tmp_path, one, two))
    assert (curve.x.tolist(), curve.mean.tolist()) == ([12], [-95])


def test_one_seed_has_no_band_and_one_without_times_no_curve(tmp_path):
    (run,) = runs_of(tmp_path / "a", validations((1, 10.0, -100.0), (2, 20.0, -90.0)))
    assert over_epochs([run], VALIDATION).error is None
    untimed = [{"epoch": 1, VALIDATION: -100.0}]
    (run,) = runs_of(tmp_path / "b", untimed)
    assert over_seconds([run]) is None and over_epochs([run], VALIDATION).mean == [-100]
    assert over_epochs([run], "coupling/meeting_time_p50") is None


def test_of_the_lines_during_an_epoch_the_mean_counts(tmp_path):
    tag = "coupling/meeting_time_p50"
    lines = [{"epoch": 0, tag: 4.0}, {"epoch": 0, tag: 8.0}, {"epoch": 1, tag: 5.0}]
    curve = over_epochs(runs_of(tmp_path, lines), tag, during=True)
    assert curve.x.tolist() == [1, 2] and curve.mean.tolist() == [6, 5]


def test_a_steep_start_is_cut_off():
    steep = Curve(np.arange(8.0), np.array([-500.0, -110, -100, -99, -98, -97, -96, -95]), None)
    assert _bottom([steep]) == pytest.approx(-100 - 0.05 * 5)
    flat = steep._replace(mean=steep.mean.clip(min=-100))
    assert _bottom([flat]) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"valid_samples": 100}, "100 samples"),
        ({"valid_refinements": 0}, "100 samples"),
        ({"valid_samples": 20}, "not with as many samples everywhere: levels differ by that"),
        ({"valid_refinements": 4}, "not by the same proposals everywhere: levels differ by that"),
    ],
)
def test_the_axis_tells_how_was_validated(changes, says, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", {f"config.trainer.{key}": value for key, value in changes.items()})
    (section,) = compare(find([tmp_path])).sections
    assert _validated(section) == f"importance sampling, {says}"


def test_the_axis_tells_of_refined_proposals(tmp_path):
    write_run(tmp_path / "a", {"config.trainer.valid_refinements": 4})
    (section,) = compare(find([tmp_path])).sections
    expected = "importance sampling, 100 samples, proposals refined in 4 steps"
    assert _validated(section) == expected


def drawn(folder, suffix=""):
    (section,) = compare(find([folder])).sections
    names = draw(section, folder, suffix)
    for name in names:
        picture = imread(folder / name)
        height, width, _ = picture.shape
        assert 300 < height < 3000 and 500 < width < 3000
        assert picture[..., :3].std() > 0.02  # not blank
    assert not list(folder.glob("*.partial"))
    return names


def test_pictures(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"iwae{seed}", {"seed": seed})
    assert drawn(tmp_path) == ["log_likelihood.png"]
    meeting = {f"coupling/meeting_time_{name}": 5.0 for name in ("p50", "p90", "p99")}
    times = [{"epoch": 0, **meeting}, *validations((1, 100.0, -90.0), (2, 200.0, -80.0))]
    for seed in range(2):
        write_run(tmp_path / f"coupled{seed}", COUPLED | {"seed": seed}, times)
    assert drawn(tmp_path, "_x") == ["log_likelihood_x.png", "meeting_times_x.png"]


def test_a_group_without_a_common_epoch_is_shown_against_seconds_alone(tmp_path, monkeypatch):
    for seed, epoch in enumerate((4, 6)):
        lines = validations((epoch, 60.0, -90.0 + epoch))
        write_run(tmp_path / f"coupled{seed}", COUPLED | {"seed": seed}, lines)
    write_run(tmp_path / "iwae", metrics=[{"epoch": 5, VALIDATION: -100.0}])
    found = []
    monkeypatch.setattr(figures, "curves", lambda *given: found.append(given))
    (section,) = compare(find([tmp_path])).sections
    draw(section, tmp_path, "")
    ((_, _, _, (epochs, seconds), names, _),) = found
    assert [list(panel.curves) for panel in (epochs, seconds)] == [[names[0]], [names[1]]]
    assert names[0].startswith("iwae") and names[1].startswith("coupled")
    assert seconds.title == "1 without recorded times"


def test_no_picture_of_nothing(tmp_path):
    write_run(tmp_path / "a", metrics=[])
    assert drawn(tmp_path) == []


def test_pictures_of_many_groups_with_long_names(tmp_path):
    for i in range(9):
        settings = {f"config.estimator.a_rather_long_name_{k}": i for k in range(5)}
        write_run(tmp_path / str(i), settings)
    assert drawn(tmp_path) == ["log_likelihood.png"]


def test_curves_with_long_names_have_the_letters_of_the_table(tmp_path, monkeypatch):
    names = []

    def curves(path, title, label, panels, own, *rest, **settings):
        names.append((own, [list(panel.curves) for panel in panels]))

    monkeypatch.setattr(figures, "curves", curves)
    for i in range(2):
        write_run(tmp_path / str(i), {f"config.estimator.a_rather_long_name_{k}": i for k in "abc"})
    (section,) = compare(find([tmp_path])).sections
    draw(section, tmp_path, "")
    (own, of_panels), *_ = names
    assert own[0].startswith("iwae (a), a_rather_long_name_a 0, ")
    assert own[1].startswith("iwae (b), a_rather_long_name_a 1, ")
    assert own[0].endswith(" (1 seed)") and all(found == own for found in of_panels)


def test_a_logarithmic_axis_has_no_line_from_zero(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    seconds, error = np.array([0.0, 100.0, 200.0]), np.full(3, 0.1)
    panel = figures.Panel("", "s", {"iwae": Curve(seconds, np.arange(3.0), error)})
    for logarithmic, first in ((False, 0), (True, 100)):
        panels = [panel._replace(logarithmic=logarithmic)]
        figures.curves(tmp_path / "a.png", "title", "label", panels, ["iwae"])
        (line,) = drawn.pop().axes[0].lines
        assert list(line.get_xdata()) == [x for x in seconds if x >= first]


def test_long_labels_stay_in_the_picture(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    label = "validation log-likelihood, nats\n(importance sampling, 20 samples, proposals refined"
    label += " in 10 steps)"
    panel = figures.Panel("", "epochs", {"iwae": Curve(np.arange(3), np.arange(3.0), None)})
    figures.curves(tmp_path / "a.png", "title", label, [panel], ["iwae"])
    (figure,) = drawn
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    written = figure.axes[0].yaxis.get_label().get_window_extent(canvas.get_renderer())
    assert 0 <= written.y0 and written.y1 <= figure.bbox.height and written.x0 >= 0
    assert "refined" in figure.axes[0].get_ylabel()
