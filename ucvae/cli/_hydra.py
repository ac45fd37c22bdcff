"""Hydra, set up for a command of ours, with what it refuses put into one line.

Beside it stand the resolvers and the logging classes that the YAML files name.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import textwrap
import urllib.parse
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.conf import HydraConf
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, Sweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ucvae.cli import _runs, _workers
from ucvae.config import (
    GROUPS,
    OPTIONAL,
    choices,
    config_dir,
    show,
    unknown_choice,
    unknown_key,
)
from ucvae.errors import ConfigError
from ucvae.progress import quiet

log = logging.getLogger(__name__)

VERSION_BASE = "1.3"


# Output folders


def output_folder(config: DictConfig, key: str) -> tuple[Path, bool]:
    """Return the folder that ``key`` asks for, and whether the time is a part of its name."""
    pattern = as_written(config.hydra)
    for part in key.split(".")[1:]:
        pattern = pattern[part]
    HydraConfig.instance().set_config(config)
    return Path(select(config, key)), "${now:" in str(pattern)


def select(config: DictConfig, key: str) -> str:
    try:
        return str(OmegaConf.select(config, key, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {_first_line(error)}") from None


def as_written(config: DictConfig | ListConfig) -> Any:
    """Return a configuration in plain dicts and lists, its interpolations as they are."""
    return OmegaConf.to_container(config, resolve=False)


def without_hydra(config: DictConfig) -> DictConfig:
    """Return what a job gets to see of a composed configuration."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _swept(config: DictConfig) -> dict[str, Any]:
    """What an experiment sweeps over.

    As it is written: what it refers to, the seed for example, is that of each job.
    """
    return as_written(config.hydra.sweeper).get("params") or {}


# Composition, with Hydra's errors put into one line


class Session:
    """Hydra, set up for one command."""

    def __init__(self, instance: Hydra, config_name: str) -> None:
        self.hydra = instance
        self.loader = instance.config_loader
        self.config_name = config_name

    def mode(self, overrides: list[str]) -> RunMode | None:
        return self.hydra.get_mode(self.config_name, overrides)

    def compose(self, overrides: list[str], mode: RunMode) -> DictConfig:
        with self._explained(overrides, mode):
            self._refuse_lists(overrides)
            config = self.hydra.compose_config(self.config_name, overrides, mode)
        _check_verbose(config)
        return config

    def multirun(
        self,
        task: Callable[[DictConfig], Any],
        overrides: list[str],
        watched: Callable[[Launcher], Launcher],
    ) -> None:
        """Do what Hydra's own ``multirun`` does, with ``watched`` put around the launcher."""
        config = self.hydra.compose_config(
            self.config_name, overrides, RunMode.MULTIRUN, with_log_configuration=True
        )
        callbacks = Callbacks(config)
        callbacks.on_multirun_start(config=config, config_name=self.config_name)
        # Not all sweepers do that.
        OmegaConf.save(config, Path(config.hydra.sweep.dir) / _runs.ASKED)
        sweeper = Plugins.instance().instantiate_sweeper(
            config=config,
            hydra_context=HydraContext(config_loader=self.loader, callbacks=callbacks),
            task_function=task,
        )
        # The sweepers of optimisers are a shell around one that has the launcher.
        keeper: Any = getattr(sweeper, "sweeper", sweeper)
        keeper.launcher = watched(keeper.launcher)
        sweeper.sweep(arguments=as_written(config.hydra.overrides.task))
        callbacks.on_multirun_end(config=config, config_name=self.config_name)

    def over_the_experiment(self, overrides: list[str]) -> list[str]:
        """Put what an experiment sweeps over among the overrides, less the keys that these set.

        Raises:
            ConfigError: of several experiments, one is a sweep.
        """
        config = self.compose(overrides, RunMode.MULTIRUN)
        for choice in self._experiments(overrides):
            alone = self.compose([f"experiment={choice}"], RunMode.MULTIRUN)
            if alone.hydra.sweeper.get("params"):
                raise ConfigError(f"experiment={choice} is a sweep of its own; start it by itself")
        given = {override_key(text) for text in overrides}
        swept = _swept(config)
        added = [f"{key}={value}" for key, value in swept.items() if key not in given]
        return [*added, *overrides, "hydra.sweeper.params=null"] if swept else overrides

    def _experiments(self, overrides: list[str]) -> list[str]:
        """The experiments that a sweep has jobs of, if it has them of several."""
        return [
            choice
            for override in OverridesParser.create(self.loader).parse_overrides(overrides)
            if override.key_or_group == "experiment" and override.is_sweep_override()
            for choice in override.sweep_string_iterator()
        ]

    def jobs(self, config: DictConfig) -> list[list[str]]:
        """Return the overrides of each job, in the order in which Hydra's own sweeper has them."""
        parser = OverridesParser.create(self.loader)
        swept = [f"{key}={value}" for key, value in _swept(config).items()]
        given = as_written(config.hydra.overrides.task)
        with self._explained([], RunMode.MULTIRUN):
            parsed = parser.parse_overrides([*swept, *given])
            for override in parsed:
                _refuse_sweep(override)
            return BasicSweeper.split_arguments(parsed, None)[0]

    def compose_job(self, config: DictConfig, overrides: list[str], number: int) -> DictConfig:
        with self._explained(overrides, RunMode.RUN):
            self._refuse_lists(overrides)
            job_config = self.loader.load_sweep_config(config, overrides)
        _check_verbose(job_config)
        with open_dict(job_config):
            job_config.hydra.job.id = job_config.hydra.job.num = number
        return job_config

    def _refuse_lists(self, overrides: list[str]) -> None:
        """Refuse several choices of a component, of which Hydra would make a mixture."""
        for override in OverridesParser.create().parse_overrides(overrides):
            group, value = override.key_or_group, override.value()
            if group in GROUPS and isinstance(value, list) and self._is_group(override):
                options = self.loader.get_group_options(group)
                raise ConfigError(unknown_choice(group, f"[{','.join(map(show, value))}]", options))

    @contextmanager
    def _explained(self, overrides: list[str], mode: RunMode) -> Iterator[None]:
        try:
            yield
        # Hydra raises ValueError for a group's choice that is not text.
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise ConfigError(self._explain(error, overrides, mode)) from None

    def _explain(self, error: Exception, overrides: list[str], mode: RunMode) -> str:
        if isinstance(error, OverrideParseException):
            return _unreadable(error)
        if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
            group, _, choice = error.missing_cfg_file.rpartition("/")
            if group:
                return unknown_choice(group, choice, error.options)
        parsed = OverridesParser.create().parse_overrides(overrides)
        if found := _OVERRIDES_NOTHING.match(str(error)):
            group, choice, sets = found.groups()
            # What was asked for may build on the choice that cannot be.
            asked = [str(one.value()) for one in parsed if one.key_or_group == group]
            return self._unsuitable(group, asked[-1] if asked else choice, sets, mode)
        for override in parsed:
            if fault := self._fault(override, parsed, mode):
                return fault
        message = _first_line(error).removeprefix("Error merging override ")
        return f"{message}: {_first_line(error.__cause__)}" if error.__cause__ else message

    def _unsuitable(self, group: str, choice: str, sets: str, mode: RunMode) -> str:
        """Say that ``group=choice`` chooses in a group that this command has not."""
        suitable = []
        for other in self.loader.get_group_options(group):
            try:
                self.hydra.compose_config(self.config_name, [f"{group}={other}"], mode)
            except HydraException:
                continue
            suitable.append(other)
        return (
            f"{group}={choice}: sets {sets}, which cannot be chosen here; allowed: "
            f"{', '.join(suitable)}"
        )

    def _fault(self, override: Override, others: list[Override], mode: RunMode) -> str | None:
        """Say what is wrong with one override; None if nothing known is."""
        key, value = override.key_or_group, override.value()
        if not key:
            return f"{override.input_line}: no key there; write KEY=VALUE"
        if override.is_sweep_override():
            many = mode == RunMode.RUN
            fault = "several values need -m, a sweep; --cfg, --info and --help show one run"
            return f"{override.input_line}: {fault}" if many else None
        if self._is_group(override) and not isinstance(value, dict):
            known = isinstance(value, str | list) or override.is_delete()
            options = self.loader.get_group_options(key)
            return None if known else unknown_choice(key, show(value), options)
        if override.is_add() or override.is_force_add():
            return None
        lines = [other.input_line or "" for other in others if self._is_group(other)]
        lines = [line for line in lines if "={" not in line]
        try:
            node = self.hydra.compose_config(self.config_name, lines, mode)
        except (HydraException, OmegaConfBaseException, ValueError):
            return None  # a group is at fault, and named when its own turn comes
        plain = as_written(node)
        group = key.partition(".")[0]
        if group in OPTIONAL and plain.get(group) is None:
            allowed = ", ".join(self.loader.get_group_options(group))
            return f"{key}: no {group} is chosen; add {group}=CHOICE; allowed: {allowed}"
        return next(filter(None, (_missing_key(leaf, plain) for leaf in _leaves(key, value))), None)

    def _is_group(self, override: Override) -> bool:
        key = override.key_or_group
        # The one loader that Hydra has, ConfigLoaderImpl, has it.
        return bool(key) and self.loader.repository.group_exists(key)  # type: ignore[attr-defined]


# What Hydra says of an experiment that is made for another command.
_OVERRIDES_NOTHING = re.compile(r"In '(\w+)/([^']+)': Could not override '(\w+)'\. No match")


def _unreadable(error: OverrideParseException) -> str:
    if "=" not in str(error.override):
        return f"{error.override}: no = there; write KEY=VALUE"
    lines = str(error).splitlines()
    reason = lines[1] if lines[0].startswith("Error parsing override") else lines[0]
    if reason.startswith("LexerNoViableAltException"):
        reason = "unexpected character"
    return (
        f"{error.override}: cannot be read ({reason}); write KEY=VALUE, and KEY=\"'VALUE'\" if the "
        "value holds other than letters, digits and / - + . _ % * @ ?"
    )


def _leaves(key: str, value: Any) -> list[str]:
    """List the dotted keys that ``key=value`` sets."""
    if not isinstance(value, dict):
        return [key]
    return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]


def _missing_key(key: str, node: Any) -> str | None:
    """Say which part of a dotted key has no place in ``node``; None if all have."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        here = ".".join(parts[: depth + 1])
        if not isinstance(node, dict):
            return f"{here}: no such key; {'.'.join(parts[:depth])} is a value"
        if part not in node:
            names = [str(name) for name in node if not str(name).startswith("_")]
            if not depth:
                names = [*(name for name in names if name != "hydra"), "experiment", *OPTIONAL]
            return unknown_key(here, set(names))
        node = node[part]
    return None


@contextmanager
def session(config_name: str, args: Namespace) -> Iterator[Session]:
    """Set up Hydra as ``hydra.main`` does, and take it down again."""
    version.setbase(VERSION_BASE)
    path = Path(args.config_path or config_dir()).absolute()
    search_path = create_config_search_path(str(path))
    if args.config_dir is not None:
        extra = Path(args.config_dir).absolute()
        if not extra.is_dir():
            raise ConfigError(f"--config-dir: {extra} is not a folder")
        search_path.prepend("command-line", f"file://{extra}", SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    instance = Hydra.create_main_hydra2(config_name, search_path)
    _prefer_our_files()
    try:
        yield Session(instance, args.config_name or config_name)
    finally:
        GlobalHydra.instance().clear()


def _refuse_sweep(override: Override) -> None:
    """Refuse values to sweep over of which Hydra would make no job, or no message."""
    value = override.value()
    if isinstance(value, ChoiceSweep) and any(isinstance(one, Sweep) for one in value.list):
        raise ConfigError(f"{override.input_line}: values, or one range(...), not both")
    if override.is_discrete_sweep() and not any(True for _ in override.sweep_iterator()):
        raise ConfigError(f"{override.input_line}: there is no value to sweep over")


def _check_verbose(config: DictConfig) -> None:
    """Refuse what Hydra would only assert, and later."""
    value = config.hydra.verbose
    if not (isinstance(value, bool | str) or OmegaConf.is_list(value)):
        raise ConfigError(
            f"hydra.verbose: {show(value)} is not true, false, or the names of loggers"
        )


def _prefer_our_files() -> None:
    """Forget the plugins' own configurations where we have files for them.

    Hydra would take them for the files' schemas, which they are not.
    """
    hydras = ConfigStore.instance().repo["hydra"]
    for group in ("launcher", "sweeper"):
        for choice in choices(f"hydra/{group}"):
            hydras.get(group, {}).pop(f"{choice}.yaml", None)


def quote(value: str) -> str:
    """Quote a text so that Hydra's override grammar reads it back unchanged."""
    return QuotedString(value, Quote.single).with_quotes()


def quote_path(override: str, keys: tuple[str, ...]) -> str:
    """Quote the value of a path key: folders of sweeps have = and , in their names."""
    key, equal, value = override.partition("=")
    plain = value and value[0] not in "'\"" and value.lower() != "null"
    if not (equal and key in keys and plain):
        return override
    # A shell expands a ~ at the beginning of a word alone.
    return f"{key}={quote(os.path.expanduser(value))}"


def from_here(path: str) -> str:
    """Return a path that counts from where the command was given, for a job that may be elsewhere.

    With ``hydra.job.chdir=true`` a job has a working directory of its own.
    """
    here = os.getcwd()
    given = HydraConfig.get().runtime.cwd if HydraConfig.initialized() else here
    return path if given == here else os.path.join(given, path)


def how_to_go_on(name: str, key: str, folder: str, config: DictConfig | HydraConf) -> str:
    """Return the command that goes on with ``folder``, which was asked for under ``config.hydra``.

    It repeats ``--config-dir``, without which the choices that are kept there are not found.
    """
    words = [name]
    for source in config.runtime.config_sources:
        if source.provider == "command-line":
            words += ["--config-dir", shlex.quote(source.path)]
    return " ".join([*words, f"{key}={shlex.quote(folder)}"])


def choose_nothing(override: str) -> str:
    """Return ``~GROUP`` for ``GROUP=null``, which Hydra takes in YAML files alone."""
    group, _, value = override.partition("=")
    return f"~{group}" if group in (*OPTIONAL, "experiment") and value == "null" else override


def override_key(override: str) -> str:
    """Return the key or group that an override sets, without a ``+`` or ``~`` before it."""
    return override.partition("=")[0].lstrip("+~")


def override_value(override: str) -> Any:
    """Return the value that an override sets, as Hydra reads it.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return OverridesParser.create().parse_overrides([override])[0].value()
    except OverrideParseException as error:
        raise ConfigError(_unreadable(error)) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Resolvers and logging, named in the YAML files


def folder_name(overrides: str) -> str:
    """Turn a job's overrides into the name of its folder; different ones get different names.

    Characters that are special in paths or shells are percent-encoded. A name longer than 200
    characters is cut and ends with a checksum of the whole.

    >>> folder_name("estimator=iwae,seed=1")
    'estimator=iwae,seed=1'
    >>> folder_name("data_dir=/data")
    'data_dir=%2Fdata'
    >>> folder_name("")
    'default'
    """
    name = urllib.parse.quote(overrides, safe="=,+~@")
    if name in ("", ".", ".."):
        return name.replace(".", "%2E") or "default"
    if len(name) <= 200:
        return name
    return f"{name[:190]}-{zlib.crc32(overrides.encode()):08x}"


# At import, because launchers resolve a job's folder in processes of their own.
OmegaConf.register_new_resolver("ucvae.folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver(
    "ucvae.choices", lambda group: ", ".join(choices(group)), replace=True
)


def groups_text() -> str:
    """Each configuration group with several choices, in lines of at most 80 characters.

    Those of the user's own folders (``--config-dir``) are among them. ``a[_short]`` stands for two
    choices, a and a_short.
    """
    loader = GlobalHydra.instance().config_loader()
    lines = []
    for group in (*sorted(GROUPS), "experiment"):  # which is the longest
        names = loader.get_group_options(group)
        if len(names) > 1:
            second = {f"{name}_short" for name in names}
            shown = [
                f"{name}[_short]" if f"{name}_short" in names else name
                for name in names
                if name not in second
            ]
            lines.append(f"{group}: {', '.join(shown)}")
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="  ") for line in lines)


OmegaConf.register_new_resolver("ucvae.groups", groups_text, replace=True)

OmegaConf.register_new_resolver("ucvae.workers", _workers.count, replace=True)

# What an evaluation does: its study, if there is one; and to which checkpoint, if not to the best.
OmegaConf.register_new_resolver(
    "ucvae.task",
    lambda study, evaluation, checkpoint: (
        (evaluation if study in (None, "null") else study)
        + ("" if checkpoint == "best" else f"-{checkpoint}")
    ),
    replace=True,
)

# What is meant for one estimator of a sweep over several: a warm start is the coupled one's.
OmegaConf.register_new_resolver(
    "ucvae.if_coupled",
    lambda target, value: value if target.endswith(".Coupled") else 0,
    replace=True,
)

# One of two values, the first where bits are drawn anew for each epoch.
OmegaConf.register_new_resolver(
    "ucvae.if_dynamic",
    lambda binarization, value, other: value if binarization == "dynamic" else other,
    replace=True,
)

file_log = logging.getLogger(f"{__name__}.file")


class LogFile(logging.FileHandler):
    """A run's log file; that it cannot be written is told once, in one line."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename)
        self.told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Tell of a full disk and the like; anything else is a defect of ours."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            reason = error.strerror or error
            print(f"log: cannot write {self.baseFilename}: {reason}", file=sys.stderr)


class ConsoleFormatter(logging.Formatter):
    """Messages alone; from warnings on, with their level."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for the console."""
        text = super().format(record)
        return f"{record.levelname}: {text}" if record.levelno >= logging.WARNING else text


class ConsoleFilter(logging.Filter):
    """Keeps off the console what the command prints to stderr at its end, and what need not be."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record goes to the console."""
        wanted = record.levelno >= logging.WARNING or not quiet()
        return wanted and record.name != file_log.name
