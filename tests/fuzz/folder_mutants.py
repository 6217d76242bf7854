"""Mutants of Hugging Face folders: config, weights, index, tokenizer, generation config, chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

from fuzz.bytes_mutants import mutate_bytes
from fuzz.json_mutants import GENERATION_FIELDS, ODD_TEXTS, Rules, mutate_json
from fuzz.mutation import Mutant, Mutation
from fuzz.native_mutants import EXTRAS, mutate_template
from fuzz.safetensors_file import take_apart

INDEX = "model.safetensors.index.json"
_CONFIG = Rules(defaults=True, last_wins=True)
_GENERATION = Rules(defaults=True, last_wins=True, fields=GENERATION_FIELDS)
_STRICT = Rules()
_LIBRARY = Rules(defaults=True, last_wins=True, opaque=True)
_RULES = {
    "config.json": _CONFIG,
    "generation_config.json": _GENERATION,
    "tokenizer_config.json": _CONFIG,
    "tokenizer.json": _LIBRARY,
    INDEX: _STRICT,
}
_WEIGHT = {"config.json": 8, "generation_config.json": 3, "tokenizer_config.json": 3, "tokenizer.json": 2, INDEX: 4}
_KEYS = {  # keys that are not there as a rule, which loaders of this kind of model know
    "quantization_config": ({"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}, {}, "fp8"),
    "sliding_window": (4, -1, 2**63, "4"),
    "layer_types": (["full_attention"], ["sliding_attention"] * 2, ["chunked_attention"] * 2, {}, "full_attention"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}, {"rope_type": "yarn"}, []),
    "attention_bias": (True, "false", 1),
    "mlp_bias": (True, "false"),
    "hidden_act": ("gelu", "silu ", None, ["silu"]),
    "partial_rotary_factor": (0.5, "1.0", 0),
    "auto_map": ({"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model", "AutoTokenizer": ["x.Slow", None]},),
    "dtype": ("float16", "float64", "float8_e4m3fn", "none", 16),
    "torch_dtype": ("float16", 16),
    "model_type": ("mixtral", "llama4", "gpt2", "mamba", "Llama", [], {}, "\x1b[2Jllama"),
    "num_experts": (8,),
    "attention_multiplier": (0.5,),
    "logit_scale": (0.5,),
    "use_sliding_window": (True, "no"),
    "max_window_layers": (0, 1, -5, 2**63),
    "tokenizer_class": ("LlamaTokenizer", "x.Evil", 5, "GPT2Tokenizer", "NoSuchTokenizer"),
    "eos_token_id": ([0, 2**63], [], {}, "1", -1, 2**31, [[1]], [1, "x"], 383, 384),
    "do_sample": (True, "yes", 1),
    "temperature": (0.5, -1, "hot", 1e-45, 1e300),
    "top_k": (0, -5, 2**63, "50"),
    "top_p": (0, 2, 0.5, "1"),
    "repetition_penalty": (0, 1e-40, -1, 1e40, "1.1"),
    "chat_template": ([{"name": "default", "template": "{{ messages }}"}], [], {}, 5, "{{"),
    "add_bos_token": (True, False, "yes"),
    "bos_token": ("<nope>", None, 5, {"content": 5}, {}),
    "eos_token": ("<nope>", None, 5, {"content": 5}, "</s>" * 5000),
}
_OF_CONFIG = [k for k in _KEYS if k not in ("do_sample", "temperature", "top_k", "top_p", "chat_template")]
_OF_GENERATION = ["eos_token_id", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"]
_OF_TOKENIZER = ["tokenizer_class", "auto_map", "chat_template", "add_bos_token", "bos_token", "eos_token"]


def _known_key(rng: random.Random, files: dict[str, bytes]) -> Mutation:
    """A key that means something elsewhere in the Hugging Face world."""
    name, keys = rng.choice(
        [
            ("config.json", _OF_CONFIG), ("generation_config.json", _OF_GENERATION),
            ("tokenizer_config.json", _OF_TOKENIZER),
        ]
    )  # fmt: skip
    key = rng.choice(keys)
    document = json.loads(files[name])
    document[key] = rng.choice(_KEYS[key])
    files[name] = json.dumps(document).encode()
    return Mutation("known key", name, (key,), meant=True)


def _header(rng: random.Random, files: dict[str, bytes], name: str) -> Mutation:
    """The header of a weight file."""
    part = take_apart(files[name])
    text, mutation = mutate_json(rng, part.header(), name, _STRICT)
    files[name] = part.assemble(text)
    # the dtype of float and bfloat16 halves cannot be told from their bytes; metadata is not read
    return Mutation(mutation.kind, name, mutation.path, meant=mutation.meant and mutation.path[-1:] == ("dtype",))


def _tensors(rng: random.Random, files: dict[str, bytes], name: str) -> Mutation:
    """Tensors that are more, fewer, or of another kind than the model's."""
    part = take_apart(files[name])
    tensor = rng.choice(part.tensors)
    old = tensor.name
    kind = rng.choice(("dtype", "shape", "name", "drop", "prefix", "weights", "fp8 scale", "extra", "head"))
    meant = False
    if kind == "dtype":
        tensor.dtype = rng.choice(("I8", "U8", "F8_E4M3", "F64", "BOOL", "F16", "BF16"))
        width = {"F64": 8, "F16": 2, "BF16": 2}.get(tensor.dtype, 1)
        tensor.data = rng.randbytes(width * len(tensor.data) // 4)
        meant = tensor.dtype in ("F64", "F16", "BF16")
    elif kind == "shape":
        tensor.shape = rng.choice((tensor.shape[::-1], [*tensor.shape, 1], [1, *tensor.shape], [len(tensor.data) // 4]))
    elif kind == "name":
        tensor.name = rng.choice((*ODD_TEXTS, f"{old}x", "n" * 70_000, old.replace("0", "00", 1)))
    elif kind == "drop":
        part.tensors.remove(tensor)
    elif kind == "prefix":
        for t in part.tensors:
            t.name = rng.choice(("", "transformer.", "model.")) + t.name.removeprefix("model.")
        meant = True  # checkpoints of base models
    elif kind == "weights":
        tensor.data = rng.choice((bytes(len(tensor.data)), b"\xff" * len(tensor.data), rng.randbytes(len(tensor.data))))
        meant = True
    elif kind == "fp8 scale":
        tensor.dtype, tensor.data = "F8_E4M3", rng.randbytes(len(tensor.data) // 4)
        part.tensors.append(type(tensor)(f"{old.removesuffix('.weight')}.weight_scale", "F32", [], rng.randbytes(4)))
    elif kind == "extra":
        suffix = rng.choice(("bias", "weight_scale", "lora_A", "g_idx"))
        name_of_extra = f"{old.removesuffix('.weight')}.{suffix}"
        if name_of_extra != old:
            part.tensors.append(
                type(tensor)(name_of_extra, "F32", tensor.shape[:1], rng.randbytes(4 * tensor.shape[0]))
            )
    else:
        part.tensors = [t for t in part.tensors if t.name != "lm_head.weight"]
        old = "lm_head.weight"
    files[name] = part.assemble()
    if INDEX in files:
        index = json.loads(files[INDEX])
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != name}
        index["weight_map"] |= {t.name: name for t in part.tensors}
        files[INDEX] = json.dumps(index).encode()
    return Mutation(f"tensor {kind}", name, (old,), meant)


def folder_mutant(format: str, seed: int, original: str, files: Mapping[str, bytes]) -> Mutant:
    """One mutant of a folder; the seed decides everything about it."""
    rng = random.Random(f"{format} {seed} mutant")
    made = dict(files)
    extra = rng.choice(EXTRAS[:-1])
    mutations: list[Mutation] = []
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        if mutations and mutations[0].kind in ("missing file", "not a file"):
            break
        weights = [n for n in made if n.endswith(".safetensors")]
        maker = rng.choices(
            ("json", "known", "header", "tensors", "template", "raw", "missing"), (8, 4, 3, 4, 1, 1, 0.3)
        )[0]
        name = rng.choice(weights)
        try:
            if maker == "json":
                present = [n for n in _WEIGHT if n in made]
                name = rng.choices(present, [_WEIGHT[n] for n in present])[0]
                made[name], mutation = mutate_json(rng, json.loads(made[name]), name, _RULES[name])
            elif maker == "known":
                mutation = _known_key(rng, made)
            elif maker == "header":
                mutation = _header(rng, made, name)
            elif maker == "tensors":
                mutation = _tensors(rng, made, name)
            elif maker == "template" and "chat_template.jinja" in made:
                name = "chat_template.jinja"
                made[name], mutation = mutate_template(rng, made[name], name)
            elif maker == "raw":
                name = rng.choice(list(made))
                head = 8 + int.from_bytes(made[name][:8], "little") if name in weights else None
                made[name], mutation = mutate_bytes(rng, made[name], name, head, meant=True)
            else:
                name = rng.choice(list(made))
                del made[name]
                mutation = Mutation("missing file", name, meant=not name.endswith(".safetensors") and name != INDEX)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError):
            if not mutations:
                raise
            break  # the first change left nothing that the second could read
        mutations.append(mutation)
    return Mutant(format, seed, original, tuple(mutations), made, ".", extra=extra)
