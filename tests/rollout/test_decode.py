"""The decoding loop: the tokens of transformers' ``generate``, prompts read once, finished rows dropped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import TopPLogitsWarper

from coderl.errors import UserError
from coderl.model.policy import Policy
from coderl.rollout import GenerateEngine, Sampling
from coderl.rollout.cache import read_prompts
from coderl.rollout.decode import Row, StopCriteria, TokenTexts, decode, draw
from coderl.rollout.generate import _batches
from coderl.types import Completion, Problem
from tests.support import tiny

PROBLEMS = [Problem(id=p.id, prompt=p.prompt) for p in tiny.problems(4)]
GREEDY = Sampling(temperature=0.0, max_new_tokens=20)
# Layers that look back a few tokens only keep another kind of cache; GPT-2's positions are a table.
CASES: dict[str, dict[str, Any]] = {name: {} for name in tiny.FAMILIES} | {
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "gpt2": {"model_type": "gpt2"},
}


def engine_for(policy: Policy, **options: Any) -> GenerateEngine:
    engine = GenerateEngine(**options)
    engine.bind(policy)
    return engine


def ask(policy: Policy, n: int, sampling: Sampling, seed: int = 0, **options: Any) -> list[Completion]:
    engine = engine_for(policy, **options)
    torch.manual_seed(seed)
    return engine.generate(PROBLEMS, n, sampling)


def greedily(policy: Policy, length: int, ends: Sequence[int] = ()) -> list[list[int]]:
    """The answer of transformers' ``generate`` to each single prompt, up to the first of ``ends``."""
    answers = []
    for problem in PROBLEMS:
        prompt = policy.encode(problem)
        config = GenerationConfig(
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=policy.tokenizer.pad_token_id,
            decoder_start_token_id=policy.base.generation_config.decoder_start_token_id,
        )
        model: Any = policy.base
        ids = model.generate(torch.tensor([prompt]), generation_config=config)[0].tolist()
        answer = ids[1:] if model.config.is_encoder_decoder else ids[len(prompt) :]
        stop = next((t + 1 for t, token in enumerate(answer) if token in ends), length)
        answers.append(answer[:stop])
    return answers


@pytest.fixture(scope="module", params=list(CASES))
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Its greedy answers end at different lengths."""
    folder = tmp_path_factory.mktemp(request.param)
    name = request.param if request.param in tiny.FAMILIES else "llama"
    made = tiny.policy(tiny.checkpoint(folder, name, **CASES[request.param]), name, lora=None)
    free = greedily(made, 20)
    # Each prompt but the last has a token that ends its answer.
    ends = {answer[length] for answer, length in zip(free, (2, 7, 12), strict=False)}
    made.base.generation_config.eos_token_id = sorted(ends)
    return made.eval()


def test_greedy_tokens_equal_those_of_transformers_generate(policy: Policy) -> None:
    want = greedily(policy, 20, sorted(policy.eos_ids()))
    assert len(set(map(len, want))) > 1
    for batch_size in (128, 5):
        got = ask(policy, 3, GREEDY, batch_size=batch_size)
        assert [list(c.ids) for c in got] == [answer for answer in want for _ in range(3)]
        assert all(c.finished == (c.ids[-1] in policy.eos_ids()) for c in got)


def test_samples_do_not_depend_on_when_finished_rows_are_dropped(policy: Policy) -> None:
    pad = policy.tokenizer.pad_token_id
    criteria = StopCriteria(TokenTexts(policy.tokenizer), policy.eos_ids(), ())
    assert isinstance(pad, int)
    asked, results = [policy.encode(problem) for problem in PROBLEMS], []
    for share in (0.0, 1 / 8, 0.5, 2.0):
        rows = [[Row(20), Row(5)] for _ in asked]
        decode(policy.base.eval(), asked, rows, GREEDY, criteria, pad, share)
        results.append([row for some in rows for row in some])
    for other in results[1:]:
        assert [row.ids for row in other] == [row.ids for row in results[0]]
        for row, same in zip(other, results[0], strict=True):
            assert row.logprobs == pytest.approx(same.logprobs, abs=1e-4)


def test_each_prompt_is_read_once_and_finished_rows_are_not_read_again(policy: Policy) -> None:
    shapes: list[tuple[int, ...]] = []
    stack = policy.base.get_encoder() if policy.base.config.is_encoder_decoder else policy.base.base_model
    answer = policy.base.get_decoder() if policy.base.config.is_encoder_decoder else stack
    hooks = [
        part.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape)),
            with_kwargs=True,
        )
        for part in {stack, answer}
    ]
    got = ask(policy, 6, GREEDY, merged_copy=False, batch_size=12)
    for hook in hooks:
        hook.remove()
    reads, steps = [s for s in shapes if s[1] > 1], [s[0] for s in shapes if s[1] == 1]
    assert [rows for rows, _ in reads] == [2, 2]
    starts = 4 if policy.base.config.is_encoder_decoder else 0
    least = sum(len(c.ids) - 1 for c in got) + starts
    # Rows are dropped once an eighth of the batch is finished: the samples of a prompt end together here.
    assert sum(steps) == least < 6 * 4 * 19


def test_only_the_last_prompt_tokens_logits_are_computed(llama: Path) -> None:
    policy, widths = tiny.policy(llama), []
    hook = policy.base.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: widths.append(args[0].shape[1])
    )
    ask(policy, 2, GREEDY, merged_copy=False)
    hook.remove()
    assert set(widths) == {1}


def test_positions_of_finished_rows_stay_within_a_learned_position_table(tmp_path: Path) -> None:
    policy = tiny.policy(tiny.checkpoint(tmp_path, model_type="gpt2", max_position_embeddings=60), lora=None)
    asked = [policy.encode(problem) for problem in PROBLEMS]
    rows = [[Row(60 - len(ids))] for ids in asked]
    assert max(map(len, asked)) + max(row.max_tokens for (row,) in rows) > 61
    decode(
        policy.base.eval(),
        asked,
        rows,
        GREEDY,
        StopCriteria(TokenTexts(policy.tokenizer), (), ()),
        0,
        compact_share=2.0,
    )
    want = [
        answer[: row.max_tokens] for answer, (row,) in zip(greedily_within(policy, 60), rows, strict=True)
    ]
    assert [row.ids for (row,) in rows] == want


def greedily_within(policy: Policy, length: int) -> list[list[int]]:
    """The argmax again and again, without a cache."""
    answers = []
    for problem in PROBLEMS:
        ids = policy.encode(problem)
        start = len(ids)
        with torch.no_grad():
            while len(ids) < length:
                ids = [*ids, int(policy.base(torch.tensor([ids])).logits[0, -1].argmax())]
        answers.append(ids[start:])
    return answers


# -- limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_completion_ends_at_its_own_length_limit(tmp_path: Path, family: str) -> None:
    policy = tiny.policy(tiny.checkpoint(tmp_path, family), family, lora=None)
    policy.base.generation_config.eos_token_id = None
    problems = [Problem(id=str(size), prompt="x = 1\n" * size) for size in (1, 2, 3, 4)]
    lengths = [len(policy.encode(problem)) for problem in problems]
    # The longest prompts are too long; after the shortest, max_new_tokens is the limit.
    limit, most = lengths[2], lengths[2] - lengths[0] - 1
    budgets = [most, limit - lengths[1], 0, 0]
    assert most > budgets[1] > 0 > limit - lengths[3]
    for max_length, want in ((limit, budgets), (None, [most] * 4)):
        got = engine_for(policy).generate(problems, 2, Sampling(1.0, 1.0, most, max_length))
        assert [c.problem for c in got] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [len(c.ids) for c in got] == [budget for budget in want for _ in range(2)]
        assert all(len(c.logprobs) == len(c.ids) and not c.finished for c in got)
        assert all(c.ids or c.text == "" for c in got)


def test_a_prompt_that_is_too_long_is_not_read_at_all(llama: Path) -> None:
    policy = tiny.policy(llama)
    policy.base.register_forward_pre_hook(lambda *_: pytest.fail("it was read"))
    got = ask(policy, 2, Sampling(max_length=1), merged_copy=False)
    assert [(c.ids, c.logprobs, c.text, c.finished) for c in got] == [((), (), "", False)] * 8


def test_samples_of_a_problem_share_a_batch_where_they_fit() -> None:
    for n, size, count in itertools.product((1, 3, 4, 9), (1, 4, 7, 64), (1, 5)):
        stops = [("a",), ("b",), ("b",), ("b",), ("c",)][:count]
        batches = _batches([(i, range(n)) for i in range(count)], size, stops)
        taken = [sum(len(samples) for _, samples in batch) for batch in batches]
        assert all(0 < total <= size for total in taken)
        assert all(len({stops[i] for i, _ in batch}) == 1 for batch in batches)
        for i in range(count):
            of_it = [samples for batch in batches for j, samples in batch if j == i]
            assert [*itertools.chain(*of_it)] == [*range(n)] and len(of_it) == -(-n // size)
        if n <= size:
            alike = {stop: stops.count(stop) for stop in stops}
            assert len(batches) == sum(-(-many // (size // n)) for many in alike.values())


# -- drawing tokens ------------------------------------------------------------------------------------------


def table(size: int, seed: int, width: float = 1.5) -> Tensor:
    return width * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def draws(logits: Tensor, count: int, sampling: Sampling) -> Tensor:
    torch.manual_seed(0)
    return draw(logits.expand(count, -1), sampling)[0]


def nucleus(logits: Tensor, top_p: float) -> set[int]:
    """Token by token, from the most likely on."""
    probs = logits.double().softmax(0)
    kept: set[int] = set()
    mass = 0.0
    for token in probs.argsort(descending=True).tolist():
        if kept and mass >= top_p:
            break
        kept.add(token)
        mass += float(probs[token])
    return kept


def agree(tokens: Tensor, expected: Tensor) -> bool:
    """Pearson's test at four standard deviations, over tokens that come up often enough; no others occur."""
    counts, expected = torch.bincount(tokens, minlength=len(expected)), expected * len(tokens)
    often = expected > 5
    statistic = float(((counts - expected) ** 2 / expected)[often].sum())
    freedom = int(often.sum()) - 1
    return statistic <= freedom + 4 * (2 * freedom) ** 0.5 and not counts[expected == 0].any()


@pytest.mark.parametrize("size", [1, 2, 7, 50, 2050, 3000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(size: int, temperature: float) -> None:
    logits = table(size, seed=size)
    logits[1:2] = -torch.inf
    got = draws(logits, 15_000, Sampling(temperature))
    assert agree(got, (logits / temperature).double().softmax(0))


@pytest.mark.parametrize(("size", "width"), [(7, 1.5), (50, 1.5), (600, 1.5), (600, 0.1)])
@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.5, 0.95])
def test_top_p_draws_from_the_smallest_set_of_that_mass(size: int, width: float, top_p: float) -> None:
    logits = table(size, seed=1, width=width)
    kept = nucleus(logits, top_p)
    inside = torch.zeros(size, dtype=torch.bool)
    inside[sorted(kept)] = True
    assert top_p == 0 or torch.equal(inside, ~TopPLogitsWarper(top_p)(None, logits[None])[0].isinf())
    got = draws(logits, 15_000, Sampling(1.0, top_p))
    assert agree(got, torch.where(inside, logits, -torch.inf).double().softmax(0))


def test_each_row_has_its_own_nucleus() -> None:
    logits = torch.stack([table(600, seed=1, width=width) for width in (0.01, 8.0)])
    few, many = nucleus(logits[1], 0.5), nucleus(logits[0], 0.5)
    assert len(few) < 4 and len(many) > 290
    torch.manual_seed(0)
    rows = [draw(logits, Sampling(1.0, 0.5))[0].tolist() for _ in range(2000)]
    assert {second for _, second in rows} == few
    assert {first for first, _ in rows} <= many and len({first for first, _ in rows}) > len(many) / 2


def test_logprobs_are_those_before_top_p() -> None:
    logits = table(50, seed=1).expand(100, -1)
    for sampling in (Sampling(0.7), Sampling(0.7, 0.4), Sampling(0.0)):
        tokens, logprobs = draw(logits, sampling)
        want = (logits / (sampling.temperature or 1.0)).log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
        assert torch.equal(logprobs, want) and logprobs.dtype == torch.float32


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_global_seed_decides_every_sample(llama: Path, top_p: float) -> None:
    sampling = Sampling(1.3, top_p, max_new_tokens=16)
    first, again, other = (ask(tiny.policy(llama), 5, sampling, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert [c.ids for c in first] != [c.ids for c in other]
    assert len({c.ids for c in first}) == len(first)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_same_seed_gives_the_same_samples_and_the_global_random_state_is_restored(
    llama: Path, top_p: float
) -> None:
    engine, sampling = engine_for(tiny.policy(llama)), Sampling(1.3, top_p, max_new_tokens=16)
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    first = engine.generate(PROBLEMS, 5, sampling, seed=3)
    other = engine.generate(PROBLEMS, 5, sampling, seed=4)
    assert torch.equal(torch.rand(4), expected)
    # Drawn from another place in the caller's stream by now.
    assert engine.generate(PROBLEMS, 5, sampling, seed=3) == first
    assert [c.ids for c in other] != [c.ids for c in first]
    # The seed is that of torch's global stream: an unseeded call after manual_seed gives the same samples.
    torch.manual_seed(3)
    assert engine.generate(PROBLEMS, 5, sampling) == first


def test_the_global_random_state_is_restored_even_if_sampling_fails(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(policy := tiny.policy(llama).train())

    def fails(*args: Any, **options: Any) -> None:
        torch.rand(1)
        raise ZeroDivisionError

    monkeypatch.setattr("coderl.rollout.generate.decode", fails)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROBLEMS, 1, GREEDY, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training


# -- models that cannot be sampled from ----------------------------------------------------------------------


def test_a_model_whose_cache_rows_cannot_be_selected_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny.policy(llama, lora=None)
    forward = policy.base.forward
    for kept in (None, ((torch.zeros(1),),)):

        def forgetful(*args: Any, kept: Any = kept, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.past_key_values = kept
            return output

        monkeypatch.setattr(policy.base, "forward", forgetful)
        with pytest.raises(UserError, match=r"^llama models have no cache .*: choose a model"):
            read_prompts(policy.base, [[5, 6]], 0, 4)
