"""The model card of an export, README.md, from the checkpoint's provenance and the accounts behind it."""

from __future__ import annotations

from typing import Any

from megatron_prune import artifacts
from megatron_prune.checkpoint.layout import HeterogeneousShape
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.errors import AccountError
from megatron_prune.masks.with_weights import masks_of
from megatron_prune.training import lineage
from megatron_prune.training.lineage import Stage

NAME = "README.md"
TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ "{:,}".format(shape.parameters()) }} parameters in {{ dtype }}: {{ shape.num_layers }} layers, hidden size
{{ shape.hidden_size }}, FFN {{ ffn }}, {{ heads }} heads in
{{ groups }} groups. Exported from a Megatron checkpoint by megatron_prune {{ version }}. The
fingerprint of its weights is `{{ fingerprint }}`.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH"{{ ", trust_remote_code=True" if differ }})
```
{% if differ %}

Its layers have different sizes, which no class of transformers has: `modeling_layered_llama.py` next to the weights is
the code that loads it.
{% endif %}
{% if masks %}

## Removed weights

{{ "{:,}".format(masks.removed) }} of {{ "{:,}".format(shape.linear_parameters()) }} weights of the linears are removed
({{ patterns }}). They are stored as zeros, and `masks.safetensors` says which they are, since a kept weight may be zero
too. Dense kernels run this model as fast as a dense one.
{% endif %}

## History

{% if unknown %}
What was done to these weights is not known: {{ unknown }}
{% else %}
{% for line in history %}
{{ loop.index }}. {{ line }}
{% endfor %}

{% if whole %}
In all {{ "{:,}".format(tokens) }} tokens and {{ "%.3e"|format(flops) }} FLOPs, from random weights on.
{% else %}
Before the first of these steps, the weights were made elsewhere.
{% endif %}
{% endif %}

How good the model is was not measured by the export.
"""


def card(checkpoint: Checkpoint, *, allow_missing_masks: bool = False) -> bytes:
    """The card in Markdown, with the metadata of the Hugging Face Hub."""
    from huggingface_hub import ModelCard, ModelCardData

    masks = masks_of(checkpoint, allow_missing=allow_missing_masks)
    stages, unknown = _stages(checkpoint)
    tags = ["megatron_prune", *(["pruned"] if checkpoint.pruning else []), *(["sparse"] if masks is not None else [])]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    made = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=checkpoint.root.name,
        shape=checkpoint.shape,
        heads=checkpoint.shape.range_of("num_attention_heads"),
        groups=checkpoint.shape.range_of("num_query_groups"),
        ffn=checkpoint.shape.range_of("ffn_hidden_size"),
        differ=isinstance(checkpoint.shape, HeterogeneousShape),
        dtype=str(checkpoint.spec("embedding.word_embeddings.weight").dtype).removeprefix("torch."),
        version=artifacts.versions().get("megatron-prune", ""),
        fingerprint=checkpoint.fingerprint(),
        masks=masks,
        patterns=", ".join(dict.fromkeys(entry.pattern for entry in masks.entries.values())) if masks else "",
        unknown=unknown,
        history=[words(stage) for stage in stages],
        whole=lineage.begins_at_random(stages),
        tokens=lineage.tokens(stages),
        flops=lineage.flops(stages),
    )
    return str(made).encode()


def _stages(checkpoint: Checkpoint) -> tuple[list[Stage], str]:
    """The stages behind a checkpoint, or why they are not known."""
    try:
        stages = lineage.of(checkpoint)
    except AccountError as error:
        return [], f"{error}."
    return stages, "" if stages else "the checkpoint was made elsewhere."


def words(stage: Stage) -> str:
    """One stage: ``trained from random weights on 1,000 tokens, …``"""
    read, spent = f"{stage['tokens']:,} tokens", f"{stage['flops']:.3e} FLOPs"
    if stage["kind"] == "pruned":
        masked: Any = " with masks" if stage.get("masks") else ""
        return f"pruned by {stage['method']}{masked}; read {read}, {spent}"
    start = "trained from random weights" if stage["start"] is None else "trained on"
    batch = f"{stage['steps']:,} steps of {stage['global_batch_size']} x {stage['seq_length']}"
    held = ", its zeros held" if stage["masks"] else ""
    return f"{start}: {read} ({batch}), seed {stage['seed']}{held}, {spent}"
