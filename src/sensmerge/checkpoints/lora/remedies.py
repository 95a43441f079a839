"""Commands to paste for adapters that cannot be read here: what PEFT and transformers do for them."""

from __future__ import annotations

from pathlib import Path

from .config import AdapterConfig


def remedy(config: AdapterConfig, base: Path, adapter: Path) -> str:
    """What to do about settings that are more than a plain LoRA's."""
    if config.remedy == "leave":
        return "leave this adapter out: it has no merged weights, not in PEFT either"
    if config.remedy == "convert":
        return (
            "where it was trained, save it as a plain LoRA with PEFT's"
            " `save_pretrained(folder, path_initial_model_for_weight_conversion=…)`"
        )
    return merging_command(base, adapter)


def merging_command(base: Path, adapter: Path, *, untie: bool = False, rows: int = 0) -> str:
    """Have PEFT merge an adapter; before that the base's head is parted from its embedding, or the vocabulary resized to `rows`."""
    out = f"{adapter}-merged"
    steps = [
        "from transformers import AutoModelForCausalLM as M",
        "from peft import PeftModel as P",
        f"m = M.from_pretrained({str(base)!r}, dtype='auto')",
    ]
    if rows:
        steps.append(f"m.resize_token_embeddings({rows})")
    if untie:
        steps += [
            "m.config.tie_word_embeddings = False",
            "m.set_output_embeddings(__import__('copy').deepcopy(m.get_output_embeddings()))",
        ]
    steps.append(f"P.from_pretrained(m, {str(adapter)!r}).merge_and_unload().save_pretrained({out!r})")
    return f'have PEFT merge it, and give `{out}` instead: python -c "{"; ".join(steps)}"'


def converting_command(pickled: Path, file: Path) -> str:
    """Write pickled weights as safetensors; nothing in the pickle is run."""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"save_file({{k: v.clone().contiguous() for k, v in torch.load({str(pickled)!r}, map_location='cpu',"
        f" weights_only=True).items()}}, {str(file)!r})"
    )
    return f'python -c "{code}"'
