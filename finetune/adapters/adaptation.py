"""From a run's adapter settings to what a job is made of: forms of parts, what is trained, a rule for its updates."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from compress.forms import ROUTER, Fp8, Int4, Int8, Nf4
from compress.rehearsal import Rehearsed
from finetune.adapter_config import (
    AdaLoraConfig,
    AdapterConfig,
    BottleneckConfig,
    FreezeConfig,
    Ia3Config,
    LoraConfig,
    NoAdapter,
    PrefixConfig,
    QatConfig,
)
from finetune.adapters.adalora import AdaLoraRule
from finetune.adapters.matrices import ADAPTER, Lora, Narrow, Scaled
from finetune.adapters.parts import Bottleneck, Prefix
from finetune.adapters.tables import Frozen
from model.config import MASKED_LM, ModelConfig
from model.forms import Form, Forms, Path, branch
from model.specs import HEAD, LAYERS, leaves, parameter_specs
from training.trainable import Rule, Trainable, matching

TOKENS = ("tokens",)  # the path of the token table


@dataclass(frozen=True)
class Adaptation:
    """What `training.job.make_job` takes beside a run's config."""

    forms: Forms  # of the model with its adapters
    base_forms: Forms  # of the model without them: quantised matrices, or none
    trainable: Trainable
    rule: Rule | None = None
    whole: bool = False  # the parameters are those of the model without forms, and all are trained

    def for_job(self) -> dict:
        """The arguments of make_job."""
        return {"forms": self.forms, "trainable": None if self.whole else self.trainable, "rule": self.rule}

    def trained_of(self, model: ModelConfig) -> list[str]:
        """The '/'-joined names of the model's own parameters that are trained."""
        names = ("/".join(path) for path, _ in leaves(parameter_specs(model)))
        return [name for name in names if self.trainable(name)]


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its '/'-joined names, is one of an adapter."""
    return f"/{ADAPTER}/" in name


def adaptation(config: AdapterConfig, model: ModelConfig, steps: int, new: Collection[str] = ()) -> Adaptation | None:
    """What a run of `steps` steps with these settings trains; None where it has no adapter.

    `new` are branches of the parameters that the base does not have: they are trained whatever the settings say.
    Raises ValueError for targets that the model has not, and matrices that cannot be cut into groups.
    """
    if isinstance(config, NoAdapter):
        return None
    if isinstance(config, FreezeConfig):
        own = matching(config.train, parameter_specs(model))
        return Adaptation({}, {}, lambda name: own(name) or name.partition("/")[0] in new)
    if isinstance(config, QatConfig):
        made = {"int8": Int8(), "fp8": Fp8(), "int4": Int4(config.group), "nf4": Nf4(config.group)}
        forms = {path: Rehearsed(made[config.form]) for path in targets(config.targets, model)}
        for path, form in forms.items():
            form.specs(branch(parameter_specs(model), path))
        return Adaptation(forms, {}, lambda name: True, whole=True)
    base = {path: form for path in matrices(model) if (form := _base(config))}
    specs = parameter_specs(model)
    if config.base == "bfloat16":  # the tables, too
        if "head" in new:
            raise ValueError(
                "adapter.base=bfloat16: the output table is new and trained in float32; set adapter.base=float"
            )
        base |= {(name,): Narrow() for name in ("tokens", "head") if name in specs}
    for path, form in base.items():
        form.specs(branch(specs, path))  # it raises where groups do not fit
    forms = _FORMS[type(config)](config, model, base)
    rule = AdaLoraRule(config, model.layers, steps) if isinstance(config, AdaLoraConfig) else None
    also = matching(config.also, specs) if config.also else lambda name: False
    if kept := [name for path in base if also(name := "/".join((*path, "weight")))]:
        raise ValueError(
            f"adapter.also: {kept[0]} is kept in {config.base}, in which nothing is trained: name others, or set "
            "adapter.base=float"
        )
    # the head of a task is trained even where the base has one
    heads = (*new, *(() if model.head in ("vocabulary", *MASKED_LM) else HEAD))
    trained = lambda name: is_adapter(name) or also(name) or name.partition("/")[0] in heads
    if not trained("tokens/weight"):
        forms = {**forms, TOKENS: Frozen(base.get(TOKENS))}
    return Adaptation(forms, base, trained, rule)


def adapted(config, new: Collection[str] = ()) -> dict:
    """The arguments of make_job, of a run's whole config; none where it has no adapter. Raises as `adaptation`."""
    found = adaptation(config.adapter, config.model, config.train.steps, new)
    return {} if found is None else found.for_job()


def matrices(model: ModelConfig) -> list[Path]:
    """The matrices of a layer, but the routers'."""
    paths = [path for path, spec in leaves(parameter_specs(model)) if path[0] == LAYERS and spec.is_matrix]
    return [path[:-1] for path in paths if path[-1] == "weight" and path[-2] != ROUTER]


def targets(patterns: tuple[str, ...], model: ModelConfig) -> list[Path]:
    """The matrices whose names in a layer match one of the patterns. Raises ValueError for one that none matches."""
    named = {"/".join(path[1:]): path for path in matrices(model)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(f"adapter.targets: no matrix matches {pattern}; there are {', '.join(named)}")
    return [path for name, path in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _base(config) -> Form | None:
    bases = {"float": None, "bfloat16": Narrow(), "int8": Int8(), "int4": Int4(config.group), "nf4": Nf4(config.group)}
    return bases[config.base]


def _on(base: Forms, paths: list[Path], form: Form) -> Forms:
    """The form at these paths, each on that of the base there."""
    return {path: replace(form, base=base.get(path)) for path in paths}


def _lora(config: LoraConfig, model: ModelConfig, base: Forms) -> Forms:
    divisor = config.rank**0.5 if config.scaling == "rslora" else config.rank
    form = Lora(config.rank, config.alpha / divisor, magnitude=config.dora)
    return base | _on(base, targets(config.targets, model), form)


def _adalora(config: AdaLoraConfig, model: ModelConfig, base: Forms) -> Forms:
    form = Lora(config.initial_rank, config.alpha / config.initial_rank, values=True)
    return base | _on(base, targets(config.targets, model), form)


def _ia3(config: Ia3Config, model: ModelConfig, base: Forms) -> Forms:
    paths = targets(config.targets, model)
    inner, outer = ([path for path in paths if (path[-1] == "down") == down] for down in (True, False))
    return base | _on(base, inner, Scaled(inputs=True)) | _on(base, outer, Scaled(inputs=False))


def _bottleneck(config: BottleneckConfig, model: ModelConfig, base: Forms) -> Forms:
    form, paths = Bottleneck(config.size, config.activation), []
    paths += [(LAYERS, "attention", "out")] if "attention" in config.after else []
    paths += [(LAYERS, "ffn", "down")] if "ffn" in config.after and not model.experts else []
    # first what makes a part whose matrices have forms of their own: it is behind all experts
    experts = {(LAYERS, "moe"): form} if "ffn" in config.after and model.experts else {}
    return experts | base | _on(base, paths, form)


def _prefix(config: PrefixConfig, model: ModelConfig, base: Forms) -> Forms:
    return {(LAYERS, "attention"): Prefix(config.length)} | base  # first, as experts above


_FORMS = {
    LoraConfig: _lora,
    AdaLoraConfig: _adalora,
    Ia3Config: _ia3,
    BottleneckConfig: _bottleneck,
    PrefixConfig: _prefix,
}
