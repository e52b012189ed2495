"""Every architecture, with pad = eos or not, one eos or several: sampled log-probs are the scored ones."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from coderl.algorithms import SFT
from coderl.data import CodeDataModule
from coderl.errors import UserError
from coderl.model.padding import Padded, pad_rows, spread
from coderl.model.policy import Policy
from coderl.problems import ProblemSource
from coderl.publish.export import save_merged
from coderl.rollout import GenerateEngine, Sampling
from coderl.types import Completion, Problem
from tests.support import tiny
from tests.support.fixed import REWARDS, Fixed, FixedGRPO, FixedPPO, rollout_of, run

pytestmark = pytest.mark.slow

EXTRA = 50
"""An ordinary token, or a second end-of-sequence token."""
TEMPERATURES = (0.7, 1.0, 1.5)
LONGEST = 24
PROBLEMS = [Problem(id=p.id, prompt=p.prompt) for p in tiny.problems(3)]
FAMILIES = list(tiny.FAMILIES)


class Case(NamedTuple):
    policy: Policy
    ends: set[int]
    samples: dict[float, list[Completion]]

    @property
    def completions(self) -> list[Completion]:
        return [c for some in self.samples.values() for c in some]


def policy_of(folder: Path, family: str, **options: Any) -> Policy:
    made = tiny.policy(folder, family, **options)
    tiny.stir(made)
    return made


def sample(
    policy: Policy, temperature: float = 1.0, n: int = 8, merged_copy: bool = True
) -> list[Completion]:
    engine = GenerateEngine(merged_copy=merged_copy)
    engine.bind(policy)
    torch.manual_seed(0)
    return engine.generate(PROBLEMS, n, Sampling(temperature, max_new_tokens=LONGEST))


def padded(policy: Policy, completions: list[Completion]) -> Padded:
    pad = policy.tokenizer.pad_token_id
    assert isinstance(pad, int)
    return pad_rows([c.prompt_ids for c in completions], [c.ids for c in completions], pad)


@torch.no_grad()
def scores(policy: Policy, completions: list[Completion], temperature: float = 1.0) -> Tensor:
    return policy.score(*padded(policy, completions), temperature).logprobs


@torch.no_grad()
def unpadded(policy: Policy, completion: Completion) -> tuple[Tensor, Tensor]:
    """The model's logits for one row without padding, ``[n + 1, V]``, and the input of its head."""
    prompt, answer = list(completion.prompt_ids), list(completion.ids)
    inputs = {"input_ids": torch.tensor([[*prompt, *answer]])}
    if policy.base.config.is_encoder_decoder:
        start = policy.base.generation_config.decoder_start_token_id
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *answer]])}
    seen = []
    hook = policy.base.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    logits = policy.base(**inputs).logits[0]
    hook.remove()
    return logits[-len(answer) - 1 :], seen[0][0, -len(answer) - 1 :]


@pytest.fixture(
    scope="module",
    params=list(itertools.product(FAMILIES, [False, True], [False, True])),
    ids=lambda p: f"{p[0]}-{'pad=eos' if p[1] else 'own pad'}-{'two eos' if p[2] else 'one eos'}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, pad_is_eos, several = request.param
    more = [EXTRA] if several else []
    folder = tiny.checkpoint(
        tmp_path_factory.mktemp(family), family, pad_is_eos=pad_is_eos, more_eos=more, likely=[0, 1, 2, EXTRA]
    )
    policy = policy_of(folder, family)
    samples = {t: sample(policy, t, merged_copy=t != 1.0) for t in TEMPERATURES}
    return Case(policy, {int(policy.tokenizer.eos_token_id), *more}, samples)


def test_rows_end_at_the_first_eos_token_and_nowhere_else(case: Case) -> None:
    assert case.policy.eos_ids() == case.ends
    for completion in case.completions:
        assert completion.finished == (completion.ids[-1] in case.ends)
        assert not case.ends & set(completion.ids[:-1])
        assert completion.finished or len(completion.ids) == LONGEST
        assert len(completion.logprobs) == len(completion.ids)
    last = {c.ids[-1] for c in case.completions}
    within = {i for c in case.completions for i in c.ids[:-1]}
    assert case.ends <= last
    assert {case.policy.tokenizer.pad_token_id, EXTRA} - case.ends <= within


def test_masks_cover_exactly_the_sampled_tokens(case: Case) -> None:
    ids, attention, mask = padded(case.policy, case.completions)
    assert ids[mask].tolist() == [i for c in case.completions for i in c.ids]
    assert ids[attention].tolist() == [i for c in case.completions for i in (*c.prompt_ids, *c.ids)]
    ends = (torch.isin(ids, torch.tensor(sorted(case.ends))) & mask).sum(dim=1)
    assert ends.tolist() == [int(c.finished) for c in case.completions]


def test_sampled_logprobs_are_scored_logprobs(case: Case) -> None:
    for temperature, completions in case.samples.items():
        mask = padded(case.policy, completions).mask
        sampled = spread([c.logprobs for c in completions], mask)
        torch.testing.assert_close(
            scores(case.policy, completions, temperature), sampled, atol=1e-4, rtol=1e-5
        )


def test_scores_equal_those_of_unpadded_rows_one_by_one(case: Case) -> None:
    for temperature, completions in case.samples.items():
        got, mask = scores(case.policy, completions, temperature), padded(case.policy, completions).mask
        for i in range(0, len(completions), 3):
            table = (unpadded(case.policy, completions[i])[0][:-1] / temperature).log_softmax(-1)
            want = table.gather(1, torch.tensor(completions[i].ids)[:, None]).squeeze(1)
            torch.testing.assert_close(got[i][mask[i]], want, atol=1e-4, rtol=1e-5)


def test_padding_and_order_change_nothing(case: Case) -> None:
    completions = case.samples[1.0]
    want = scores(case.policy, completions)
    order = torch.randperm(len(completions), generator=torch.Generator().manual_seed(0))
    batch = padded(case.policy, completions)
    for left, right in ((0, 6), (6, 0), (3, 40)):
        pad = torch.nn.functional.pad
        ids, attention, mask = (pad(column[order], (left, right), value=0) for column in batch)
        ids = torch.where(attention, ids, torch.randint_like(ids, len(case.policy.tokenizer)))
        with torch.no_grad():
            got = case.policy.score(ids, attention, mask, 1.0).logprobs
        assert not got[:, :left].any() and not got[:, left + want.shape[1] :].any()
        torch.testing.assert_close(got[:, left : left + want.shape[1]], want[order], atol=5e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.checkpoint(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


ROWS = [
    Completion(i, prompt, ids, (0.0,) * len(ids), "", True)
    for i, (prompt, ids) in enumerate(
        [((5, 6, 7, 8), (9, 10, 1)), ((12, 13), (14, 15, 16, 17, 1)), ((20,), (1,))]
    )
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_scores_exactly_as_its_reference(folders: dict[str, Path], family: str) -> None:
    policy = tiny.policy(folders[family], family).train()
    mine = scores(policy, ROWS)
    with policy.reference():
        assert torch.equal(scores(policy, ROWS), mine)
    tiny.stir(policy)
    assert not torch.equal(scores(policy, ROWS), mine)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_scores_as_the_policy(
    folders: dict[str, Path], tmp_path: Path, family: str, quantization: str
) -> None:
    policy = policy_of(folders[family], family, quantization=quantization)
    save_merged(policy, tmp_path)
    merged = tiny.policy(tmp_path, family, lora=None)
    torch.testing.assert_close(scores(merged, ROWS), scores(policy, ROWS), atol=1e-4, rtol=1e-4)
    with policy.reference():
        assert float((scores(merged, ROWS) - scores(policy, ROWS)).abs().max()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_whole_adapter_with_and_without_checkpointing(
    folders: dict[str, Path], family: str
) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(5)  # the adapter's start
        policy = policy_of(folders[family], family, gradient_checkpointing=checkpointing).train()
        assert policy.base.is_gradient_checkpointing is checkpointing
        policy.score(*padded(policy, ROWS), 1.0).logprobs.square().sum().backward()
        gradients.append({name: p.grad for name, p in policy.trainable().items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any(), name
        widest = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, atol=2e-5 * widest, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_critic_values_the_states_before_each_token_and_after_the_last(
    folders: dict[str, Path], family: str
) -> None:
    policy = policy_of(folders[family], family)
    policy.add_critic(own_adapter=True)
    head: Any = policy.critic
    torch.nn.init.normal_(head.linear.weight)
    mask = padded(policy, ROWS).mask
    with torch.no_grad():
        values, final = policy.values(*padded(policy, ROWS))
        for i, row in enumerate(ROWS):
            given = unpadded(policy, row)[1]
            # T5's head takes states that are scaled down.
            want = head(given * policy.base.config.hidden_size**0.5 if family == "t5" else given)
            torch.testing.assert_close(values[i][mask[i]], want[:-1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(final[i], want[-1], atol=1e-4, rtol=1e-4)


def test_an_untied_head_stays_untied_in_the_merged_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """T5 1.1 has one, though transformers says of every T5 that embedding and head are tied."""
    base: Any = AutoModelForSeq2SeqLM.from_pretrained(folders["t5"])
    base.lm_head.weight = torch.nn.Parameter(torch.randn_like(base.lm_head.weight))
    base.config.scale_decoder_outputs = False
    base.save_pretrained(tmp_path / "base")
    policy = tiny.policy(folders["t5"], "t5")
    policy.tokenizer.save_pretrained(tmp_path / "base")
    policy = policy_of(tmp_path / "base", "t5")
    base = policy.base
    assert not torch.equal(base.shared.weight, base.lm_head.weight)
    save_merged(policy, tmp_path / "merged")
    merged = tiny.policy(tmp_path / "merged", lora=None)
    torch.testing.assert_close(scores(merged, ROWS), scores(policy, ROWS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merged_copy", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoints_generation_config_does_not_change_sampling(
    folders: dict[str, Path], family: str, merged_copy: bool
) -> None:
    policy = policy_of(folders[family], family)
    plain = sample(policy, n=4, merged_copy=merged_copy)
    others = {"top_k": 1, "forced_bos_token_id": 5, "forced_eos_token_id": 6, "repetition_penalty": 9.0}
    others |= {"max_length": 3, "no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1}
    for name, value in others.items():
        setattr(policy.base.generation_config, name, value)
    before = policy.base.generation_config.to_dict()
    assert [c.ids for c in sample(policy, n=4, merged_copy=merged_copy)] == [c.ids for c in plain]
    assert len({c.ids for c in plain}) > len(plain) / 2
    assert policy.base.generation_config.to_dict() == before


@pytest.mark.parametrize("family", ["qwen2", "t5"])
def test_stop_strings_in_the_prompt_do_not_end_a_completion(folders: dict[str, Path], family: str) -> None:
    policy = policy_of(folders[family], family)
    free = sample(policy, temperature=1.5)
    marks = tuple(sorted({c.text[3:5] for c in free if len(c.text) > 6})[:8])
    engine = GenerateEngine()
    engine.bind(policy)
    torch.manual_seed(0)
    # The prompt holds every mark, which must not end a row at its first token.
    problems = [Problem(id=p.id, prompt=" ".join([p.prompt, *marks]), stop=marks) for p in PROBLEMS]
    stopped = engine.generate(problems, 8, Sampling(1.5, max_new_tokens=LONGEST))
    assert any(len(c.ids) == LONGEST for c in stopped) or len({len(c.ids) for c in stopped}) > 3
    assert any(c.finished for c in stopped)
    for completion in stopped:
        whole = policy.tokenizer.decode(list(completion.ids), skip_special_tokens=True)
        ended = completion.ids[-1] in policy.eos_ids()
        assert completion.finished == (ended or any(mark in whole for mark in marks))
        assert not any(mark in completion.text for mark in marks)


class Given(ProblemSource):
    name = "given"

    def load(self, split: str) -> list[Problem]:
        return tiny.problems() if split == "train" else []


def test_an_encoder_decoder_model_learns_to_write_solutions(folders: dict[str, Path]) -> None:
    module = SFT(policy=tiny.policy(folders["t5"], "t5"), learning_rate=1e-2)
    fit = tiny.trainer(max_steps=60, max_epochs=-1, limit_val_batches=0)
    fit.fit(module, datamodule=CodeDataModule(Given(), batch_size=3))
    engine = GenerateEngine()
    engine.bind(module.policy)
    answers = engine.generate(tiny.problems(), 1, Sampling(temperature=0.0, max_new_tokens=30))
    assert [c.text for c in answers] == [p.solution for p in tiny.problems()]
    assert all(c.finished for c in answers)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_empty_mask_has_no_gradient(folders: dict[str, Path], family: str) -> None:
    policy = policy_of(folders[family], family)
    policy.add_critic(own_adapter=False)
    ids, attention, mask = padded(policy, ROWS)
    logprobs, _, critic = policy.score(ids, attention, torch.zeros_like(mask), 1.0, values=True)
    assert critic is not None
    (logprobs.sum() + critic.values.sum() + critic.final.sum()).backward()
    assert not logprobs.any() and not critic.values.any() and not critic.final.any()
    assert not any(p.grad.any() for p in policy.trainable().values() if p.grad is not None)


def test_dropout_of_an_encoder_decoder_checkpoint_is_switched_off(tmp_path: Path) -> None:
    policy = policy_of(tiny.checkpoint(tmp_path, "t5", dropout_rate=0.5), "t5").train()
    assert torch.equal(scores(policy, ROWS), scores(policy, ROWS))


def test_an_encoder_decoder_model_without_a_start_token_is_refused(folders: dict[str, Path]) -> None:
    policy = tiny.policy(folders["t5"], "t5")
    policy.base.generation_config.decoder_start_token_id = None
    assert scores(policy, ROWS).any()  # config.json names one too
    policy.base.config.decoder_start_token_id = None
    with pytest.raises(UserError, match="decoder_start_token_id"):
        scores(policy, ROWS)


@pytest.mark.parametrize("kind", [FixedGRPO, FixedPPO])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_changes_the_trainable_parameters_and_no_others(
    folders: dict[str, Path], family: str, kind: type[Fixed]
) -> None:
    rollout = rollout_of(folders[family], REWARDS, family=family)
    trained, start = policy_of(folders[family], family), policy_of(folders[family], family)
    module = run(folders[family], rollout, kind=kind, policy=trained, inner_epochs=1)
    assert module.logged[0]["policy/ratio"] == pytest.approx(1.0)
    after, trainable = dict(trained.named_parameters()), trained.trainable()
    for name, parameter in start.named_parameters():
        moved = not torch.equal(parameter, after[name])
        assert moved is (name in trainable), name
