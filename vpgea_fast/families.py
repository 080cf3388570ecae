"""What a family of models computes, measured on a tiny clone of its configuration before any weight
is loaded: names of keys mean different things in different families, and code says what is true.

    config -> no dropout, no jitter -> clone (2 layers and more, narrow, random weights, CPU)
           -> packed twice, alone, padded with a cache, at a far position -> HeadOptions, or refused

The clone keeps the kinds of layers, the shape of a head and its rotary embedding, and every scale.
Its cost is 20 to 300 ms a configuration, once a process.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoModelForCausalLM, DynamicCache

from vpgea_fast import attention
from vpgea_fast.packing import pack_rows
from vpgea_fast.types import PackedBatch, TrainRow

VOCABULARY = 64
LENGTHS = (9, 14, 1, 12)
"""Tokens of the measured documents: three longer than the clone's window, and one of one token."""

WINDOW = 5
TOLERANCE = 1e-4
"""Of the largest logit. Float32 gives below 2e-6; the smallest fault seen so far was 1e-2."""

RANDOM_KEYS = ("drop", "jitter")
NARROW = {
    "vocab_size_per_layer_input": VOCABULARY,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": WINDOW,
}
"""Largest value of a key in the clone. Widths and counts that change no formula."""

OTHER_THAN_TEXT = ("audio", "image", "speech", "text", "video", "vision", "vq")
"""Beginnings of the names of parts that a model of text alone does not have."""

LARGEST = 50_000_000
"""Parameters of a clone: Gemma 3, with heads 256 wide and six layers, has 10 million."""

NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Keys of a configuration without effect on the measurement, which is made once for all others."""

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""What a configuration of any family answers to, whatever its config.json calls it."""

LARGEST_COUNT = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), 1000),
    **dict.fromkeys(("hidden_size", "n_embd", "vocab_size"), 100_000_000),
    **dict.fromkeys(("num_attention_heads", "n_head"), 100_000_000),
    **dict.fromkeys(("intermediate_size", "head_dim", "num_key_value_heads"), 2**31 - 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2**31 - 1),
}
"""Key of a whole number from 1 -> the largest that a model can have: beyond it a mistake takes
minutes or the memory."""

ABOVE_ZERO = ("_eps", "_epsilon", "rope_theta")
"""Endings of the keys of numbers by which a model divides."""


class HeadOptions(NamedTuple):
    """logits = softcap tanh(logit_scale (W h + b) / softcap); softcap None is no tanh."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, raw: torch.Tensor) -> torch.Tensor:
        """The formula, of `raw` = W h + b."""
        scaled = self.logit_scale * raw
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()


def without_randomness(config: Any) -> Any:
    """Set every rate of dropout, of dropped layers and of router noise to 0, in parts too.

    In place. Router logits are off: they only serve an auxiliary loss."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            without_randomness(value)
        elif _is_rate(name, value):
            setattr(config, name, 0.0)
        elif name == "output_router_logits":
            setattr(config, name, False)
    return config


def remove_randomness(model: nn.Module) -> None:
    """Every rate of the configuration, every Dropout module and every rate that a module keeps for
    itself becomes 0."""
    if hasattr(model, "config"):
        without_randomness(model.config)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # Attention keeps `attention_dropout` as a plain number, read at every forward.
        for name, value in list(vars(module).items()):
            if _is_rate(name, value):
                setattr(module, name, 0.0)


def measure(config: Any) -> HeadOptions:
    """What stands between the head's product and the logits, after a proof that the family scores
    a packed document as it does alone, twice the same. Errors: ValueError."""
    check(config)
    config = without_randomness(copy.deepcopy(config))
    facts = {k: v for k, v in config.to_dict().items() if k not in NOT_THE_MODEL}
    key = f"{type(config).__name__} {facts}"
    if key not in _MEASURED:
        _MEASURED[key] = _measured(config)
    return _MEASURED[key]


_MEASURED: dict[str, HeadOptions] = {}


def check(config: Any) -> None:
    """Refuse by the configuration alone what no clone is needed for. Errors: ValueError."""
    name = config.model_type
    with in_words(f"the configuration of {name!r} cannot be read", "correct its config.json"):
        _check(config, name)


def check_values(content: Mapping[str, Any]) -> None:
    """Refuse what transformers would take and no run can: quantised weights, numbers that are none,
    and counts that are no size of a model, in the parts of a configuration too. Errors: ValueError,
    which names the key alone."""
    for key, value in content.items():
        if key == "quantization_config" and value is not None:
            how = value.get("quant_method", "?") if isinstance(value, Mapping) else value
            raise ValueError(f"quantization_config says {how!r}: quantised weights are not trained")
        if key in LARGEST_COUNT and value is not None:
            _check_counts(key, value)
        elif isinstance(value, Mapping):
            check_values(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}, expected a finite number")
        # Beyond int64, where torch raises an OverflowError that names no key.
        elif isinstance(value, int) and abs(value) > 2**63 - 1:
            raise ValueError(f"{key} is {str(value)[:20]}..., which is no size of a model")
        elif key.endswith(ABOVE_ZERO) and isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f"{key} is {value}, expected a number above 0")


def _check_counts(key: str, value: Any) -> None:
    most = LARGEST_COUNT[key]
    for count in value if isinstance(value, list) else [value]:  # a list: one for each layer
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
            raise ValueError(f"{key} is {count!r:.40}, expected a whole number of 1..{most}")


def _check(config: Any, name: str) -> None:
    if config.is_encoder_decoder:
        raise FamilyError(f"model.path: {name!r} is an encoder and a decoder; take a causal LM")
    others = [part for part in config.sub_configs if part.startswith(OTHER_THAN_TEXT)]
    # A multimodal configuration holds the decoder's as a part.
    if config.get_text_config() is not config or others:
        raise FamilyError(
            f"model.path: {name!r} is a model of more than text; take a text-only causal LM"
        )
    if getattr(config, "num_kv_shared_layers", None):
        raise FamilyError(
            f"model.path: layers of {name!r} share keys and values (num_kv_shared_layers), which a "
            "small model of it does not show; take another model"
        )
    try:
        # By attribute: attribute_map gives every family's own name of a size (GPT-2: n_layer).
        check_values({key: getattr(config, key, None) for key in (*SIZES, "quantization_config")})
    except ValueError as error:
        remedy = "correct its config.json, or take the model unquantised"
        raise FamilyError(f"model.path: of {name!r} {error}; {remedy}") from error
    attention.check_model(config)


NO_INTERFACE = (
    "the attention of {!r} does not go through transformers' attention interface, which keeps "
    "packed documents apart"
)


def _measured(config: Any) -> HeadOptions:
    name = config.model_type
    with in_words(f"the configuration of {name!r} makes no model", "correct its config.json"):
        try:
            clone = _clone(config)
        except KeyError as error:  # its class looks the implementation up in a table of its own
            if error.args[0] not in attention.NAMES.values():
                raise
            reason = f"model.path: {NO_INTERFACE.format(name)}; take another model"
            raise FamilyError(reason) from error
    documents = _documents()
    # Without it `documents` is an unknown argument, or the mask of no elements fails.
    with in_words(NO_INTERFACE.format(name), "take another model"):
        raw = _packed(clone, pack_rows(documents), name)
    with in_words(f"a model of type {name!r} does not run", "take another model"):
        logits = _alone(clone, documents)
        options = fit_head(raw, logits, clone.config, name)
        _check_padded(clone, documents, logits, name)
        _check_far(clone, config, name)
    return options


@contextmanager
def in_words(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a model's own code raises into a ValueError of one line; words of ours stay."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]  # torch's may be pages long
        if isinstance(error, ValueError) and text.startswith("model.path"):
            raise
        if isinstance(error, ValueError) and text.startswith(("attention:", "packed attention:")):
            raise FamilyError(f"model.path: {text}") from error
        raise FamilyError(
            f"model.path: {what} ({type(error).__name__}: {text}); {remedy}"
        ) from error


class FamilyError(ValueError):
    """A measurement that came out wrong; its text is whole."""


def fit_head(
    raw: torch.Tensor, logits: torch.Tensor, config: Any, name: str, *, tolerance: float = TOLERANCE
) -> HeadOptions:
    """The HeadOptions with which `raw` = W h + b gives the model's own `logits`, both (T, V).

    The scale is measured, and must be 1, or a number of the configuration or its inverse: then it
    is the same for any width. `tolerance` is of the largest logit. Errors: FamilyError.
    """
    numbers = {
        key: float(value)
        for key, value in config.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value
    }
    # Granite divides by logits_scaling, Cohere multiplies by logit_scale.
    known = {1.0, *numbers.values(), *(1.0 / value for value in numbers.values())}
    raw, logits = raw.double(), logits.double()
    error = math.inf
    for cap in (None, *(value for key, value in numbers.items() if "softcap" in key)):
        x, y = raw, logits
        if cap is not None:
            inside = (logits / cap).abs() < 0.9  # beyond it rounding grows
            x, y = raw[inside], cap * (logits[inside] / cap).atanh()
        scale = float((x * y).sum() / (x * x).sum())  # least squares through 0
        nearest = min(known, key=lambda value: abs(value - scale))
        options = HeadOptions(nearest, cap)
        # Judged on all logits, also those that were too near the cap to measure by.
        error = min(error, float((options.logits(raw) - logits).abs().max()))
        if error <= tolerance * float(logits.abs().max()):
            return options
    raise FamilyError(
        f"model.path: the logits of {name!r} are not those of its head, with any scale or softcap "
        f"of its config.json: {error:.2g} off at best; take another model"
    )


def shrunken(config: Any) -> Any:
    """A copy with few layers, few heads and narrow: of each kind of layer one at least, and heads
    as wide as they were."""
    small = without_randomness(copy.deepcopy(config))
    values = {key: value for key, value in small.to_dict().items() if value is not None}
    layers, heads = small.num_hidden_layers, small.num_attention_heads
    lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == layers}
    # Deep enough for each value of each per-layer list: Gemma 3's first full layer is its sixth.
    depth = max([2, *(1 + v.index(x) for v in lists.values() for x in v)])
    depth = min(depth, layers)
    width = getattr(small, "head_dim", None) or small.hidden_size // heads  # Gemma names it
    keys = getattr(small, "num_key_value_heads", None)
    few_keys = min(keys or heads, 2)
    # Grouped heads stay grouped: with one query head per key head a wrong repetition is right.
    few_heads = few_keys * min(heads // (keys or heads), 2)
    changes: dict[str, Any] = {key: value[:depth] for key, value in lists.items()}
    changes |= {"vocab_size": VOCABULARY, "num_hidden_layers": depth}
    changes |= {"num_attention_heads": few_heads, "hidden_size": few_heads * width}
    if isinstance(keys, int):
        changes["num_key_value_heads"] = few_keys
    # OPT: of another width than the model, an embedding has a projection behind it.
    if values.get("word_embed_proj_dim") == small.hidden_size:
        changes["word_embed_proj_dim"] = changes["hidden_size"]
    for key, limit in NARROW.items():
        value = getattr(small, key, None)
        if type(value) is int:  # a list per layer, or text, in some families
            changes[key] = min(value, limit)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):  # torch: a pad row must exist
        value = getattr(small, key, None)
        if type(value) is int and value >= VOCABULARY:
            changes[key] = 0
    for key, value in changes.items():
        setattr(small, key, value)
    return small


def _clone(config: Any) -> Any:
    """The shrunken model with random weights: logits of a few units, norms and biases that are not
    the trivial ones, as a wrong place would not show with those."""
    small = shrunken(config)

    def build(device: str) -> Any:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(small), dtype=torch.float32, attn_implementation=attention.register()
            )

    # Counted without storage first: a width that no key of NARROW names may be any size.
    size = sum(parameter.numel() for parameter in build("meta").parameters())
    if size > LARGEST:
        raise FamilyError(
            f"model.path: a narrow {config.model_type!r} of {small.num_hidden_layers} layers still "
            f"has {size:,} parameters, too many to measure it; correct its config.json"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # a run draws as it would without
        torch.manual_seed(0)
        clone = build("cpu")
        for parameter in clone.parameters():
            if parameter.ndim > 1:
                # By fan-in: activations keep their size through the layers, whatever the width.
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        clone.get_output_embeddings().weight.normal_(
            0.0, 4.0 * clone.get_output_embeddings().in_features ** -0.5
        )
    remove_randomness(clone)
    return clone


def _documents() -> list[TrainRow]:
    generator = torch.Generator().manual_seed(1)  # the same documents for every family
    ids = [torch.randint(3, VOCABULARY, (n + 1,), generator=generator) for n in LENGTHS]
    return [
        TrainRow(
            context_ids=x[:1],
            token_ids=x[1:],
            coef=torch.ones(x.numel() - 1),
            stream="prior",
            view="student",
        )
        for x in ids
    ]


@torch.no_grad()
def _packed(clone: Any, batch: PackedBatch, name: str) -> torch.Tensor:
    """Return (T, V), the head's product at every target, in train mode. Errors: FamilyError for two
    passes that differ in a bit."""
    clone.train()  # dropout would show in this mode alone
    first, second = (
        clone.get_output_embeddings()(
            clone.base_model(**attention.packed_inputs(batch)).last_hidden_state[0]
        )[batch.logit_index]
        for _ in range(2)
    )
    clone.eval()
    if not torch.equal(first, second):
        raise FamilyError(
            f"model.path: {name!r} scores the same row twice with a difference of "
            f"{float((first - second).abs().max()):.2g}: something in it is random; take another"
        )
    return first


@torch.no_grad()
def _alone(clone: Any, documents: list[TrainRow]) -> torch.Tensor:
    """Return (T, V), the model's own logits per document, with transformers' eager attention."""
    clone.set_attn_implementation("eager")
    logits = [clone(_ids(row)[None, :-1], use_cache=False).logits[0] for row in documents]
    clone.set_attn_implementation(attention.register())
    return torch.cat(logits)


@torch.no_grad()
def _check_padded(clone: Any, documents: list[TrainRow], logits: torch.Tensor, name: str) -> None:
    """Sampling: rows padded on the left, then one more token with a cache. Errors: FamilyError."""
    rows = [_ids(row)[:-1] for row in documents]
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long).unbind()
    for number, row in enumerate(rows):
        ids[number, width - len(row) :], mask[number, width - len(row) :] = row, 1
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=clone.config)  # by kind of layer: sliding ones forget
    parts = []
    for part in (slice(0, width - 1), slice(width - 1, width)):  # as `generate` calls a model
        output = clone(
            input_ids=ids[:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=places[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(output.logits)
    sampled = torch.cat(parts, dim=1)[mask.bool()]
    _check_same(sampled, logits, name, "in a padded batch with a cache")


@torch.no_grad()
def _check_far(clone: Any, config: Any, name: str) -> None:
    """A last token at the last position that may be used moves nothing before it: else the rotary
    embedding of a document depends on its neighbours. Errors: FamilyError."""
    ids = torch.arange(3, 11)[None]
    near = torch.arange(8)[None]
    far = near.clone()
    room = attention.positions(config)[0]
    far[0, -1] = (room or 1 << 20) - 1  # dynamic scaling goes by the largest position
    first, second = (
        clone(ids, position_ids=places, use_cache=False).logits[0, :-1] for places in (near, far)
    )
    _check_same(second, first, name, f"with a token at position {int(far[0, -1])} behind it")


def _check_same(got: torch.Tensor, expected: torch.Tensor, name: str, where: str) -> None:
    error = float((got - expected).abs().max())
    if not error <= TOLERANCE * float(expected.abs().max()):  # `not`: NaN is refused
        raise FamilyError(
            f"model.path: {name!r} gives a document other logits {where} than alone: {error:.2g} "
            "apart; take another model"
        )


def _ids(row: TrainRow) -> torch.Tensor:
    return torch.cat([row.context_ids, row.token_ids])


def _is_rate(name: str, value: Any) -> bool:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and value != 0 and any(word in name.lower() for word in RANDOM_KEYS)
