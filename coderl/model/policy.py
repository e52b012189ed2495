"""The policy: one base model in memory (in 4 bits or not) and LoRA adapters on it.

The policy is the base with its adapter, the reference is the base without it (or with a frozen earlier one),
and PPO's critic may read the base through an adapter of its own.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from coderl.errors import UsageError, UserError
from coderl.model import adapters, architectures, loading, shared_prompts, tokenization
from coderl.model.adapters import LoRA
from coderl.model.logprobs import EntropyMode, Scores, ValueHead, Values, token_scores, values_of
from coderl.model.shared_prompts import Prompts, Reading
from coderl.problems import prompts
from coderl.types import ComputeDtype, Quantization

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coderl.types import Problem


class Policy(nn.Module):
    """A code model under training. Constructing it reads nothing; :meth:`load` reads the weights.

    Args:
        model: A folder, a hub id, or ``embedded`` for the tiny model in the package.
        gguf_file: Name of a GGUF file in ``model``, for checkpoints in that format.
        quantization: ``nf4`` holds the base in 4 bits (QLoRA, arXiv:2305.14314); ``none`` does not.
        compute_dtype: ``auto`` is bfloat16 on a GPU that has it, else float16; float32 on a CPU.
        lora: The adapter; null trains all weights (needs ``quantization: none``).
        adapter: Folder of an adapter to start from, in peft's format. A frozen copy of it is the reference.
        from_scratch: Start from random weights for the model's config.json.
        prompt_form: ``completion`` lets the model continue the problem's text; ``chat`` asks through the
            model's chat template, with the answer opened at a fenced code block.
        gradient_checkpointing: Trade about 30 % of the update's speed for most of its activation memory. Null
            does so where the activations of two sequences would not fit.
        train_dropout: Let dropout act in the update. Off, the policy's ratio to itself is exactly 1.
    """

    def __init__(
        self,
        model: str,
        gguf_file: str | None = None,
        quantization: Quantization = "nf4",
        compute_dtype: ComputeDtype = "auto",
        lora: LoRA | None = LoRA(),  # noqa: B008 -- a dataclass of plain values, never changed
        adapter: str | None = None,
        from_scratch: bool = False,
        prompt_form: prompts.PromptForm = "completion",
        gradient_checkpointing: bool | None = None,
        train_dropout: bool = False,
    ) -> None:
        super().__init__()
        if quantization == "nf4" and lora is None:
            raise UsageError("lora: null trains all weights, which 4-bit ones cannot: set quantization: none")
        if lora is None and adapter is None and compute_dtype in ("float16", "bfloat16"):
            raise UsageError(
                f"lora: null trains all weights, and {compute_dtype} would round most updates away: set "
                "compute_dtype: float32, and trainer.precision: bf16-mixed for speed"
            )
        if from_scratch and (quantization == "nf4" or lora is not None or adapter):
            raise UsageError(
                "from_scratch trains all weights: set quantization: none, lora: null and no adapter"
            )
        self.model, self.gguf_file, self.quantization = model, gguf_file, quantization
        self.compute_dtype, self.lora, self.adapter = compute_dtype, lora, adapter
        self.from_scratch, self.prompt_form = from_scratch, prompt_form
        self.gradient_checkpointing, self.train_dropout = gradient_checkpointing, train_dropout
        self.is_checkpointing = False  # whether activations are computed again in the backward
        self.net: Any = None  # the base, inside peft's model where there are adapters
        self.critic: ValueHead | None = None
        self._active: str | None = adapters.POLICY  # which adapter computes; None is the base alone
        self._prompts: Prompts | None = None
        self._readings: dict[tuple[str | None, bool], Reading] = {}
        self.reference_refreshed = False  # then a checkpoint must hold the reference as well
        self._tokenizer: PreTrainedTokenizerBase | None = None

    # -- loading ---------------------------------------------------------------------------------------------

    @property
    def trains_all(self) -> bool:
        """Whether all weights train, in float32, rather than an adapter."""
        return self.lora is None and self.adapter is None

    @property
    def source(self) -> str:
        """The folder or hub id of the base's plain weights."""
        return loading.resolve(self.model, self.gguf_file)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, read on first use; it always has a pad token."""
        if self._tokenizer is None:
            self._tokenizer = tokenization.load_tokenizer(self.source)
            if self.prompt_form == "chat" and not self._tokenizer.chat_template:
                raise UserError(
                    f"{self.model} has no chat template: set prompt_form: completion, or drop --chat"
                )
        return self._tokenizer

    def load(self, device: torch.device, for_training: bool = True) -> None:
        """Load the weights and attach the adapter. Does nothing the second time.

        Args:
            device: Where they go.
            for_training: Whether something will be trained. Otherwise a new adapter, which changes nothing,
                is left out.

        Raises:
            UserError: If model, tokenizer or adapter cannot be read, or do not fit each other.
        """
        if self.net is not None:
            return
        self._ids_without_row  # noqa: B018 -- refuses a tokenizer that does not fit before weights are read
        all_weights = for_training and self.trains_all
        # Updates of all weights would be rounded away in 16 bits; an adapter has float32 weights of its own.
        dtype = torch.float32 if all_weights else loading.compute_dtype(self.compute_dtype, device)
        loading.let_adapters_use_tensor_cores(dtype, device)
        base = loading.load_base(self.source, self.quantization, dtype, device, random=self.from_scratch)
        architectures.check_padding(base)
        if self.adapter is not None:
            self.net = adapters.load(base, self.adapter)
        elif for_training and self.lora is not None:
            self.net = adapters.create(base, self.lora, self.model)
        else:
            self.net = base
        if not for_training:
            self.net.requires_grad_(False)
        if for_training:
            architectures.check_head(self.base)
        if self.gradient_checkpointing:
            self.checkpoint_activations()
        self.train(self.training)

    def require_context(self, prompt: int, answer: int, fix: str) -> None:
        """Refuse sequences that are longer than what the model reads. Before the weights load.

        Args:
            prompt: Tokens of the longest prompt.
            answer: Tokens of the longest answer to it.
            fix: How to mend it; ``{known}`` stands for how many tokens the model reads.

        Raises:
            UsageError: They are.
        """
        config = loading.read_config(self.source)
        known = architectures.context_length(config)
        # The two stacks of an encoder-decoder model read one of them each.
        asked = max(prompt, answer) if config.is_encoder_decoder else prompt + answer
        if known is not None and asked > known:
            what = (
                f"prompts of {prompt:,} and answers of {answer:,} tokens" if prompt else f"{answer:,} tokens"
            )
            raise UsageError(
                f"{self.model} reads {known:,} tokens at most, not {what}: {fix.format(known=known)}"
            )

    def notes(self) -> list[str]:
        """What a user should know of the loaded weights: which are not in 4 bits, which have no adapter."""
        experts = adapters.expert_parameters(self.base)
        count = sum(parameter.numel() for parameter in experts.values())
        lines = []
        if self.quantization == "nf4":
            found = loading.WeightCount.of(self.base)
            sizes = [f"{size / 1e6:,.1f} MB" for size in (found.quantized_bytes, found.plain_bytes)]
            lines.append(
                f"{self.model}: {found.quantized:,} weights in 4 bits take {sizes[0]}, "
                f"{found.plain:,} others {sizes[1]}"
                + (f"; {count:,} of these are experts, which nf4 leaves as they are" if count else "")
            )
        without = experts.keys() - adapters.adapted(self.base).keys()
        if self.has_adapter and without:
            names = sorted({".".join(name.rsplit(".", 3)[-3:]) for name in without})
            lines.append(
                f"{self.model}: its experts have no adapter and stay as they are; to give them one, set "
                f"policy.lora.target_parameters to [{', '.join(names)}]"
            )
        return lines

    def checkpoint_activations(self) -> None:
        """Turn gradient checkpointing on."""
        # transformers renamed the method within version 5.
        enable = (
            getattr(self.base, "activation_checkpointing_enable", None)
            or self.base.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
        shared_prompts.keep_cache(self.base)
        self.is_checkpointing = True
        self.base.enable_input_require_grads()

    def add_critic(self, own_adapter: bool) -> None:
        """Add a value head. Does nothing the second time.

        Args:
            own_adapter: Whether the critic has an adapter of its own, which needs one of the policy's.
                Otherwise it shares the policy's weights, and one forward serves both.
        """
        if self.critic is not None:
            return
        if own_adapter:
            assert self.has_adapter, "all weights train: there is no second adapter"
            adapters.add(self.net, adapters.CRITIC, trains=True)
        width = self.base.get_output_embeddings().weight.shape[1]
        self.critic = ValueHead(int(width)).to(self.device)
        self.train(self.training)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, adapters included where there are any."""
        net = self.net.get_base_model() if hasattr(self.net, "get_base_model") else self.net
        return net  # type: ignore[no-any-return]

    @property
    def has_adapter(self) -> bool:
        """Whether the loaded model computes through an adapter, rather than by its base's weights alone."""
        return self.net is not self.base

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.net.parameters()).device  # type: ignore[no-any-return]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> Policy:
        """Set the mode, but keep dropout off unless ``train_dropout`` asks for it."""
        super().train(mode)
        if not self.train_dropout:
            for module in self.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
        return self

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Inside, dropout is off even where ``train_dropout`` asks for it."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    # -- text ------------------------------------------------------------------------------------------------

    def encode(self, problem: Problem) -> list[int]:
        """Token ids of the problem's prompt in this policy's prompt form.

        Raises:
            UserError: If it contains a special token that the model's embedding has no row for.
        """
        text = self._prompt_text(problem)
        ids = list(self.tokenizer(text, add_special_tokens=self._adds_special_tokens)["input_ids"])
        self._require_rows(ids, f"the prompt of {problem.id}")
        return ids

    def encode_answer(self, problem: Problem, answer: str) -> list[int]:
        """Token ids of an answer as the model would write it after the prompt, an end token included.

        Raises:
            UserError: See :meth:`encode`.
        """
        end = int(self.tokenizer.eos_token_id)
        if self._is_encoder_decoder:
            # The decoder reads the answer alone: it is encoded as a text of its own, with special tokens.
            ids = list(self.tokenizer(answer)["input_ids"])
            ids = ids[:-1] if ids[-1:] == [end] else ids
        else:
            ids = tokenization.encode_continuation(
                self.tokenizer, self._prompt_text(problem), answer, self._adds_special_tokens
            )
        self._require_rows(ids, f"the answer to {problem.id}")
        return [*ids, end]

    def _require_rows(self, ids: list[int], where: str) -> None:
        if missing := self._ids_without_row.intersection(ids):
            token = self.tokenizer.convert_ids_to_tokens(min(missing))
            raise UserError(
                f"{self.model} does not know the token {token} in {where}: change that text, or leave the "
                "problem out"
            )

    @cached_property
    def _ids_without_row(self) -> set[int]:
        return tokenization.ids_without_row(self.tokenizer, loading.embedding_rows(self.source), self.model)

    def _prompt_text(self, problem: Problem) -> str:
        if self.prompt_form == "completion":
            return problem.prompt
        text = self.tokenizer.apply_chat_template(
            prompts.chat_messages(problem), tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text + prompts.CHAT_OPENING

    @cached_property
    def _is_encoder_decoder(self) -> bool:
        return architectures.is_encoder_decoder(
            self.source
        )  # by config.json: problems are encoded before weights load

    @property
    def _adds_special_tokens(self) -> bool:
        return self.prompt_form == "completion"  # a chat template writes them itself

    def eos_ids(self) -> set[int]:
        """Every token that ends a sequence: the tokenizer's, and all of the model's generation config."""
        listed = self.base.generation_config.eos_token_id
        more = listed if isinstance(listed, list) else [listed]
        return {int(i) for i in [self.tokenizer.eos_token_id, *more] if i is not None}

    # -- scoring ---------------------------------------------------------------------------------------------

    def score(
        self,
        ids: Tensor,
        attention: Tensor,
        mask: Tensor,
        temperature: float,
        entropy: EntropyMode = "none",
        values: bool = False,
    ) -> Scores:
        """Log-probabilities of the tokens under ``mask``, on request entropy and values, in one forward.

        Padding on either side changes nothing.

        Args:
            ids: ``[B, T]``.
            attention: ``[B, T]`` bool.
            mask: ``[B, T]`` bool, tokens to score; never one without a token before it.
            temperature: Logits are divided by it, as in sampling.
            entropy: Whether to return the entropy as well, with or without gradient.
            values: Whether to return the values of a critic that shares the policy's adapter as well.
        """
        hidden = self._hidden(ids, attention, mask)
        head = self.base.get_output_embeddings()
        # The state before each token under the mask; only these are multiplied with the vocabulary.
        states = architectures.head_input(self.base, hidden[:, :-1][mask[:, 1:]])
        logprobs, entropies = token_scores(head, states, ids[mask], temperature, entropy)
        zeros = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        return Scores(
            zeros.masked_scatter(mask, logprobs),
            None if entropy == "none" else zeros.masked_scatter(mask, entropies),
            values_of(self._value_head, hidden, mask) if values else None,
        )

    def values(self, ids: Tensor, attention: Tensor, mask: Tensor) -> Values:
        """The critic's values. A critic with its own adapter is called inside :meth:`critic_adapter`."""
        return values_of(self._value_head, self._hidden(ids, attention, mask), mask)

    def _hidden(self, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        reading = None
        if self._prompts is not None:
            key = self._active, torch.is_grad_enabled()  # what was read without gradient has none
            reading = self._readings.setdefault(key, Reading(self._prompts, collects=True))
        return architectures.hidden_states(self.base, ids, attention, mask, reading)

    @contextmanager
    def reading(self, prompts: Prompts) -> Iterator[None]:
        """Inside, these prompts are read once for all batches, whose rows begin with one of them each.

        Gradients with respect to what was read are collected, and go through the prompts in the end.
        """
        assert self._prompts is None, "prompts are being read already"
        self._prompts = prompts
        try:
            yield
            for (name, _), reading in self._readings.items():
                with self._using(name):  # checkpointing runs the layers again in the backward
                    reading.backward()
        finally:
            self._prompts, self._readings = None, {}

    @property
    def _value_head(self) -> ValueHead:
        assert self.critic is not None, "add_critic() comes first"
        return self.critic

    # -- adapters --------------------------------------------------------------------------------------------

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy is its reference: the adapter off, or the frozen copy of an earlier state."""
        assert self.has_adapter, "all weights train: there is no reference left"
        with self._using(adapters.REFERENCE if self.has_own_reference else None):
            yield

    @contextmanager
    def critic_adapter(self) -> Iterator[None]:
        """Inside, the base computes with the critic's adapter.

        The backward belongs inside as well: gradient checkpointing runs the layers again in it.
        """
        with self._using(adapters.CRITIC):
            yield

    @contextmanager
    def _using(self, name: str | None) -> Iterator[None]:
        before, self._active = self._active, name
        try:
            with adapters.using(self.net, name) if name != adapters.POLICY else nullcontext():
                yield
        finally:
            self._active = before

    @property
    def has_own_reference(self) -> bool:
        """Whether the reference is a frozen adapter, rather than the base without one."""
        return adapters.has(self.net, adapters.REFERENCE)

    @staticmethod
    def is_critics(name: str) -> bool:
        """Whether a parameter of that name is the critic's alone."""
        return name.startswith("critic.") or f".{adapters.CRITIC}." in name

    def refresh_reference(self, weights: dict[str, Tensor] | None = None) -> None:
        """Replace the reference by the policy's present adapter, or by these weights of one."""
        if not self.has_own_reference:
            adapters.add(self.net, adapters.REFERENCE, trains=False)
            self.train(self.training)  # switches off the dropout that comes with the new adapter
        self.reference_refreshed = True
        adapters.fill(self.net, adapters.REFERENCE, weights or adapters.weights(self.net, adapters.POLICY))

    def reference_weights(self) -> dict[str, Tensor]:
        """The reference adapter's weights, for a checkpoint."""
        return adapters.weights(self.net, adapters.REFERENCE)

    # -- plain weights ---------------------------------------------------------------------------------------

    def dense_copy(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> PreTrainedModel:
        """A model of the base's architecture without adapters or quantization. Its weights are uninitialized.

        Args:
            dtype: Of its weights; by default the base's.
            device: Where its weights are; by default where the policy's are.
        """
        config = type(self.base.config).from_dict(
            {k: v for k, v in self.base.config.to_dict().items() if k != "quantization_config"}
        )
        dtype = dtype or self.base.dtype
        with torch.device("meta"):  # random weights would be made only to be overwritten
            copy = architectures.auto_class(config).from_config(config, dtype=dtype)
        copy = copy.to_empty(device=device or self.device)
        # Tied as the base is: a checkpoint may hold its own weights for a head that its config ties.
        copy.all_tied_weights_keys = dict(self.base.all_tied_weights_keys)
        copy.tie_weights(recompute_mapping=False)
        copy.generation_config = self.base.generation_config
        return copy.eval().requires_grad_(False)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merge_into(self, copy: PreTrainedModel, progress: str | None = None) -> None:
        """Write base + adapter into a plain copy, on any device. The policy's own weights are only read.

        Args:
            copy: See :meth:`dense_copy`.
            progress: Label of a progress bar, in modules; none where None.
        """
        # Merging and unmerging in place would requantize NF4 each time, and bfloat16 would drift.
        # The last module of a name is the original one, inside of those that peft has put around it.
        layers = {adapters.plain_name(path): module for path, module in self.base.named_modules()}
        adapted = adapters.adapted(self.base)
        modules = list(copy.named_modules())
        for name, module in tqdm(
            modules, desc=progress, unit="module", leave=False, disable=progress is None
        ):
            own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            for key, value in own.items():
                dense = loading.dense(layers[name], key)
                if (adapter := adapted.get(f"{name}.{key}")) is not None:
                    # Summed in float32 and rounded once, to the copy's precision.
                    dense = dense.float() + adapter.get_delta_weight(adapters.POLICY).float()
                turned = key == "weight" and loading.is_transposed(layers[name])
                value.copy_(dense.T if turned else dense)

    def merged(self, dtype: torch.dtype | None = None, progress: str | None = None) -> PreTrainedModel:
        """Base + adapter as a new plain model in the CPU's memory: a GPU may hold the optimizer too."""
        copy = self.dense_copy(dtype, torch.device("cpu"))
        self.merge_into(copy, progress)
        return copy
