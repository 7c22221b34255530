"""Fields of a config.json: typed access, and what each is to us: read, harmless, or refused where
it would change the maths.

transformers keeps every field of a config.json and its models read a few. A field that is none of a
family's own is kept unread there; where other models give it a meaning that changes outputs, a
config that sets it describes another model than its `model_type` says, so it is refused here by
name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from common.errors import CheckpointError

# Read by training, by output options, by generation or by tools; none changes a logit.
HARMLESS = frozenset(
    """
    architectures auto_map _name_or_path name_or_path _commit_hash transformers_version model_type
    dtype torch_dtype transformers_weights use_cache return_dict return_dict_in_generate
    output_hidden_states output_attentions output_scores output_past torchscript use_bfloat16
    chunk_size_feed_forward gradient_checkpointing id2label label2id num_labels problem_type
    finetuning_task prefix pruned_heads is_decoder cross_attention_hidden_size pad_token_id
    bos_token_id eos_token_id sep_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences begin_suppress_tokens suppress_tokens exponential_decay_length_penalty
    encoder_repetition_penalty num_assistant_tokens epsilon_cutoff eta_cutoff
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind remove_invalid_values tokenizer_class task_specific_params tf_legacy_loss
    initializer_range initializer_factor attention_dropout hidden_dropout resid_pdrop attn_pdrop
    embd_pdrop dropout_rate classifier_dropout router_aux_loss_coef router_z_loss_coef
    router_jitter_noise output_router_logits add_router_probs router_ignore_padding_tokens
    attn_implementation _attn_implementation experts_implementation _experts_implementation
    _attn_implementation_autoset pretraining_tp n_positions use_flash_attention_2 unsloth_version
    unsloth_fixed tie_last_hidden_states use_return_dict model_max_length max_window_layers
    """.split()
)

# Field -> the values with which it says nothing. None and absence always do.
_NO: tuple[Any, ...] = (False, 0)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        """
        attention_bias mlp_bias qkv_bias use_qkv_bias use_bias attention_out_bias lm_head_bias
        expert_bias add_bias_linear qk_norm use_qk_norm qk_layernorm attn_logit_softcapping
        attn_logit_softcap final_logit_softcapping logit_softcapping logits_soft_cap clip_qkv
        query_pre_attn_scalar attention_multiplier alibi parallel_attn use_parallel_residual
        n_shared_experts num_shared_experts shared_expert_intermediate_size shared_intermediate_size
        moe_intermediate_size first_k_dense_replace swiglu_limit swiglu_alpha attention_chunk_size
        add_cross_attention tie_encoder_decoder use_mup
        """.split(),
        _NO,
    ),
    **dict.fromkeys(
        """
        logit_scale logits_scaling embedding_multiplier residual_multiplier routed_scaling_factor
        n_group topk_group partial_rotary_factor rotary_pct moe_layer_freq moe_layer_frequency
        decoder_sparse_step
        """.split(),
        (1, 1.0),
    ),
    "norm_topk_prob": (True,),
    "scoring_func": ("softmax",),
    "quantization_config": ({},),
    "compression_config": ({},),
    "per_layer_config": ({}, []),
    "mlp_only_layers": ([],),
    "no_rope_layers": ([],),
    "fusion_config": ({},),
}


class Fields:
    """Typed access to config.json whose errors name the file, the field and what was found.

    raw: with aliases under the names of their fields. notes: for people, what was decided.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        family: str = "",
        aliases: Mapping[str, str] | None = None,
    ):
        self.where, self.family = where, family
        self.notes: list[str] = []
        self.defaulted: dict[str, int] = {}  # sizes that the file does not state
        self.given = raw
        self.raw: dict[str, Any] = dict(raw)
        for alias, field in (aliases or {}).items():
            value = self.raw.pop(alias, None)
            if value is None:
                continue
            if self.raw.get(field, value) != value:
                raise self.error(
                    alias,
                    f"is {value!r}, but {field!r}, another name of it, is {self.raw[field]!r}; "
                    "keep one of them",
                )
            self.raw[field] = value

    def error(self, field: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: field {field!r} {why}")

    def positive_int(self, field: str, default: int | None = None) -> int:
        value = self.raw.get(field)
        if value is None:
            if default is None:
                raise self.error(
                    field, "is missing; a config.json that belongs to the weights states it"
                )
            value = default
            if field not in self.raw:
                self.defaulted[field] = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(field, f"is {value!r}; expected a whole number above 0")
        return value

    def optional_positive_int(self, field: str) -> int | None:
        return None if self.raw.get(field) is None else self.positive_int(field)

    def number(self, field: str, default: float) -> float:
        value = self.raw.get(field)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(field, f"is {value!r}; expected a number")
        return float(value)

    def positive_number(self, field: str, default: float) -> float:
        value = self.number(field, default)
        if not 0 < value < float("inf"):
            raise self.error(field, f"is {value!r}; expected a number above 0")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.raw.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(field, f"is {value!r}; expected true or false")
        return value

    def text(self, field: str, default: str) -> str:
        value = self.raw.get(field)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(field, f"is {value!r}; expected a string")
        return value


def check_fields(fields: Fields, read: Iterable[str]) -> None:
    """Refuse fields that would change the maths and are not served; note those that nobody knows.

    read: the family's own, beside those above.
    Raises CheckpointError that names the field, its value and the mend.
    """
    known = HARMLESS | set(read)
    unknown = []
    for field, value in fields.raw.items():
        if field in NEUTRAL and field not in read:
            if value is not None and not any(_equal(value, one) for one in NEUTRAL[field]):
                raise fields.error(
                    field,
                    f"is {value!r}, which is not supported: no {fields.family} model of "
                    "transformers has it; "
                    "does config.json belong to these weights?",
                )
        elif field not in known and value is not None:
            unknown.append(field)
    if unknown:
        fields.notes.append(
            f"fields of config.json that nothing reads: {', '.join(sorted(unknown))}"
        )


def _equal(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
