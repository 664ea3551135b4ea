"""From overrides to one frozen, validated object: Hydra composes YAML and overrides, config/build.py checks them."""

import shlex
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from config.build import build, keys, mappings, one_line, plain, unknown
from config.pretrained import FROM, beginning_of, check_shapes, with_weights
from config.schema import Config, finish
from model.config import one_of
from runtime.overrides import pasted
from training.recipes import LAWS, law_number

CONF = Path(__file__).parent.parent / "conf"
AUTO = "mesh=auto"  # for mesh.auto=true


def load(overrides: list[str], *, allow_pickle: bool = False) -> Config:
    """The config of a list of overrides; `allow_pickle`: see open_pretrained. Raises ValueError in one line."""
    named = (f"{FROM}=", "weights.path=")  # two spellings of one thing
    path = next((_path_of(o) for o in reversed(overrides) if o.startswith(named)), None)
    overrides = ["mesh.auto=true" if o == AUTO else o for o in overrides if not o.startswith(named)]
    _check_keys(overrides)
    _check_single(parsed(overrides))  # Hydra itself would not say which one it could not read
    # a key that no YAML mentions is still a field of a dataclass: ++ lets Hydra set either
    forced = [o if o.startswith(("+", "~")) or is_group(o.split("=")[0]) else f"++{o}" for o in overrides]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", forced)
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from None
    if path is None:
        return finish(build(Config, with_laws(values)))
    beginning = beginning_of(path, load_run, allow_pickle=allow_pickle)
    config = finish(build(Config, with_laws(with_weights(values, beginning, overrides))))
    check_shapes(config.model, beginning, new_head=config.task is not None)
    return config


def _path_of(override: str) -> str:
    """The path of model.from=PATH: as it stands, or as Hydra reads it where it is quoted."""
    text = override.partition("=")[2]
    return str(parsed([override])[0].value()) if text[:1] in ("'", '"') else text


def overridden(config: Config, overrides: list[str], groups: tuple[str, ...]) -> Config:
    """A run's config with some keys of these groups set anew. Raises ValueError with one clear line."""
    values = plain(config)
    for override in parsed(overrides):
        group, _, name = override.get_key_element().partition(".")
        names = list(values[group]) if group in groups else []
        if name not in names:
            raise ValueError(unknown(f"{group}.{name}", [f"{g}.{n}" for g in groups for n in values[g]]))
        values[group][name] = override.value()
    return build(Config, values)


def with_laws(values: dict) -> dict:
    """The composed values with numbers where they name published laws. Raises ValueError for an unknown law."""
    named = {key: values[key[0]].get(key[1]) for key in LAWS if isinstance(values.get(key[0]), dict)}
    named = {key: law for key, law in named.items() if isinstance(law, str)}
    for (group, name), law in named.items():
        one_of(f"{group}.{name}", law, ("a number", *LAWS[group, name]))
        values = values | {group: {k: v for k, v in values[group].items() if k != name}}
    if ("train", "batch_size") in named:  # until it is known, one that divides
        values["train"]["batch_size"] = values["train"].get("grad_accumulation", 1)
    for (group, name), law in named.items():  # each may depend on those before it
        config = finish(build(Config, values))
        number = law_number((group, name), law, config.model, config.train, config.optimizer)
        values = values | {group: values[group] | {name: number}}
    return values


def parsed(overrides: list[str]) -> list[Override]:
    """The overrides as Hydra reads them. Raises ValueError for the first that it cannot read."""
    parser, parsed = OverridesParser.create(), []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException as error:
            problem = one_line(error).partition(" See http")[0]
            key, _, text = override.partition("=")
            raise ValueError(f"cannot read {override}: {problem}; as a text write {pasted(key, text)}") from None
    return parsed


def _check_single(overrides: list[Override]) -> None:
    """Raises ValueError for a key with several values, which is a text or a list only where it says so."""
    for override in overrides:
        if override.is_sweep_override():
            key, _, text = override.input_line.partition("=")
            raise ValueError(
                f"{override.input_line} is several values: for a run of each add -m (--multirun); "
                f"as one text write {pasted(key, text)}, as a list {shlex.quote(f'{key}=[{text}]')}"
            )


def compute_dtype(config: Config, goes_on: bool, platform: str) -> str:
    """What train.compute_dtype=auto is for a run: what it began with if it goes on, else what a platform is fast at."""
    if config.train.compute_dtype == "auto" and goes_on:
        return load_run(config.run.dir).train.compute_dtype_on(platform)
    return config.train.compute_dtype_on(platform)


def is_group(key: str) -> bool:
    """Whether a key chooses among presets."""
    return (CONF / key).is_dir()


def _check_keys(overrides: list[str]) -> None:
    valid, mappings_of_groups = keys(Config, every_kind=True), tuple(f"{key}." for key in mappings(Config))
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.lstrip("+~")
        if not equals:
            raise ValueError(f"{override} is no override; write key=value, as in train.steps=100")
        if is_group(key):
            presets = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
            if value not in presets:
                raise ValueError(unknown(f"{key}={value}", [f"{key}={preset}" for preset in presets]))
        elif key.startswith(mappings_of_groups):
            continue  # the names are the user's; `build` checks what stands under them
        elif key not in valid and not any(name.startswith(f"{key}.") for name in valid):
            group = key.rpartition(".")[0]
            raise ValueError(unknown(key, [k for k in valid if k.startswith(f"{group}.")] or valid, valid))


# ------------------------------------------------------------------------------------------------- a run's config.yaml


def to_yaml(config: Config) -> str:
    """The resolved config, as written to a run directory; `load_run` reads it back."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def load_run(directory: str | Path) -> Config:
    """The config of a run directory. Raises ValueError when there is none or it is damaged."""
    path = Path(directory) / "config.yaml"
    if not path.exists():
        raise ValueError(f"{directory} is no run directory: it has no config.yaml")
    try:
        return build(Config, yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from None
