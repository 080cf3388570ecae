"""What a step measures of itself: forwards that train nothing, and its line of metrics.jsonl."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vpgea_fast import diagnostics
from vpgea_fast.config import Config
from vpgea_fast.distributed import World
from vpgea_fast.names import Trained, View
from vpgea_fast.objectives import Terms
from vpgea_fast.packing import drop_zero_rows
from vpgea_fast.passes import Passes
from vpgea_fast.policies import Policies
from vpgea_fast.rollout.engine import Usage
from vpgea_fast.rows import drawn_rows, truncated_ratios
from vpgea_fast.scoring import RowsFn, score_row
from vpgea_fast.types import PathKey, ScoredBatch, TrainRow
from vpgea_fast.values import merge


@dataclass(frozen=True)
class Measure:
    """Measures a step and changes nothing. Its forwards are collectives of a sharded policy.

    `logprobs` gives the policies' log-probs of rows at the sampling temperature.
    """

    cfg: Config
    world: World
    policies: Policies
    passes: Passes
    logprobs: RowsFn
    decode: Callable[[torch.Tensor], str]

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def device(self) -> torch.device:
        return self.policies["policy"].policy.device

    @property
    def given(self) -> bool:
        """Responses of the data stand for drawn paths."""
        return self.cfg.objective.draws().given

    def importance(
        self, batch: ScoredBatch, terms: Terms
    ) -> tuple[dict[PathKey, torch.Tensor] | None, dict[str, float]]:
        """Truncated p_trainer / p_engine of every token with a gradient, and the share that was
        cut: one forward more, of the paths in the view that drew them."""
        # Off by default: where engine and trainer agree it is a forward for factors of 1.
        cap = self.cfg.rollout.importance_cap
        if cap is None:
            return None, {}
        rows = drawn_rows(batch, terms)
        return truncated_ratios(rows, self.logprobs(list(rows.values())), cap=cap)

    def known(
        self, updates: Sequence[Sequence[TrainRow]]
    ) -> tuple[list[list[TrainRow]], dict[str, float]]:
        """The rows with their log-probs before the first update, where a later one or a reference
        policy is compared with them: a forward of the rows that ask. And how far the policy is from
        the reference, where there is one."""
        # By identity: epochs share their rows, and each is scored once.
        rows = {id(row): row for part in updates for row in part}
        # With a single update every ratio is 1, and its coefficients are known already.
        several = len(updates) > 1
        asked = {
            key: row for key, row in rows.items() if row.live and (several or row.live.reference)
        }
        if not asked:
            return [list(part) for part in updates], {}
        old = dict(zip(asked, self.logprobs(list(asked.values())), strict=True))
        rows |= {key: replace(row, old=old[key]) for key, row in asked.items()}
        gaps = [row.reference - old[key] for key, row in asked.items() if row.reference is not None]
        kl = {"kl_reference": diagnostics.k3(torch.cat(gaps))} if gaps else {}
        return [[rows[id(row)] for row in part] for part in updates], kl

    def moment(
        self, rows: Sequence[TrainRow], *, moved: bool
    ) -> tuple[list[TrainRow], dict[str, float], diagnostics.Scored]:
        """The rows with the coefficients of the policy as it is now, the share of tokens that
        clipping leaves out, and the rows that were scored before, with their log-probs now.

        One forward more where it has `moved` since it drew the paths, of the rows whose
        coefficients depend on that.
        """
        live = {id(row): row.old for row in rows if row.old is not None}
        # A forward costs a third of the row's training; a clipped row then costs nothing more.
        if moved and live:
            asked = [row for row in rows if id(row) in live]
            live = dict(zip(live, self.logprobs(asked), strict=True))
        # Before it has moved its log-probs are the old ones, and every ratio is exactly 1.
        now = [row.at(live[id(row)]) if id(row) in live else row for row in rows]
        ratioed = [
            _clipped(row, live[id(row)]) for row in rows if row.old is not None and row.weighted
        ]
        share = {"clipped": torch.cat(ratioed).double().mean().item()} if ratioed else {}
        # The update itself has no log-probs of what is clipped, whose loss is constant, not zero.
        scored = [(row, live[id(row)]) for row in rows if id(row) in live]
        return drop_zero_rows(now), share, scored

    def first_pass(self, updates: Sequence[Sequence[TrainRow]]) -> list[TrainRow]:
        """One pass over the questions, as the first update has them: later epochs repeat it."""
        parts = updates[: self.cfg.train.minibatches]
        return [row for part in parts for row in self.moment(part, moved=False)[0]]

    def quality(self, batch: ScoredBatch, terms: Terms) -> dict[str, float]:
        """Means over the questions of which no path was lost, and the objective's own metrics."""
        # A lost path is no short or wrong one, so its question is in no mean.
        whole = batch.whole
        found = diagnostics.batch_metrics(whole, given=self.given) if whole else {}
        return merge(found, terms.metrics)

    def view_divergence(self, batch: ScoredBatch, terms: Terms) -> dict[str, float]:
        """KL and entropies of the two views on whole posterior paths: two no-grad heads. Questions
        that are not whole are left out: a path that the engine gave up may lack a token."""
        log_utility_BG = terms.path_scores.get("posterior", {}).get("log_utility")
        whole, temperature = batch.whole, self.cfg.rollout.temperature
        if log_utility_BG is None or whole is None:
            return {}
        # Two forwards of all these paths, and their heads: hence every metrics.diag_every steps.
        pairs, drew = whole.pairs("posterior"), whole.drawn_by("posterior")
        by: dict[View, Trained] = {"teacher": drew, "student": "policy"}
        rows = [
            replace(score_row(q.context(v), p.z_ids), who=who)
            for v, who in by.items()
            for q, p in pairs
        ]
        found = self.policies.score(
            lambda policy, batch, _: policy.logprob_entropy(batch, temperature=temperature), rows
        )
        teacher, student = found[: len(pairs)], found[len(pairs) :]
        early = diagnostics.early_answer_rate(whole, self.decode)
        return merge(
            diagnostics.view_divergence(teacher, student, log_utility_BG[batch.lost_B == 0]),
            {"early_answer_rate": early},
        )

    def records(self, batch: ScoredBatch, terms: Terms, step: int) -> list[dict[str, Any]]:
        """The lines for paths.jsonl."""
        return diagnostics.path_records(
            batch,
            terms,
            self.decode,
            step=step,
            # All of a run that only records.
            limit=None if self.cfg.train.record else self.cfg.metrics.paths_per_step,
            temperature=self.cfg.rollout.temperature,
            answer_temperature=self.cfg.scoring.answer_temperature,
        )

    def cost(
        self,
        batch: ScoredBatch,
        terms: Terms,
        rows: Sequence[TrainRow],
        *,
        usage: Usage,
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """Compute tokens, seconds, speed and memory of the step. A collective."""
        # Tokens are summed over all engines; the memory is the least that any of them freed.
        engine = {
            "prefix_hit_rate": usage.cached_tokens / max(1, usage.prompt_tokens),
            "rest_freed_mib": usage.freed_bytes / 2**20,
        }
        speed = diagnostics.speed_metrics(
            rows,
            self.passes.flops,
            seconds=seconds["time_train_s"],
            device=torch.cuda.get_device_name(self.device) if self.on_cuda else "cpu",
            devices=self.world.size,
        )
        work = diagnostics.work_metrics(batch, terms, rows, seconds=seconds, given=self.given)
        # An objective that says what its guard caught is told what that cost; nothing where all
        # that it reads is read by something else, too.
        guard = (
            {"time_guard_ratio": seconds.get("time_guard_s", 0.0) / sum(seconds.values())}
            if "guard_caught" in terms.metrics
            else {}
        )
        return merge(engine, work, guard, speed, self._memory())

    def _memory(self) -> dict[str, float]:
        """Read the peak memory so far, maximum over processes (device, or host RSS on a CPU)."""
        # Linux counts ru_maxrss in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if self.on_cuda:
            peak = torch.cuda.max_memory_allocated() / 2**20
        return {"peak_memory_mib": max(self.world.gather(peak))}


def _clipped(row: TrainRow, now: torch.Tensor) -> torch.Tensor:
    """Whether each token with a weight has lost its gradient to a clip, (n,) bool."""
    # A reference that is the policy has no pull, so what is left is the policy's own gradient.
    own = row if row.reference is None else replace(row, reference=now)
    return own.at(now).coef.eq(0)[torch.as_tensor(row.weight).ne(0).expand(now.shape)]


def evaluation_metrics(step: int, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Name the results of an evaluation of the weights of `step` as metrics.jsonl does."""
    # The line of step + 1 holds them: it is evaluated before the step. `eval_step` says whose.
    return {
        "eval_step": step,
        **{
            f"eval_{mode}_{key}": result[key]
            for mode, result in results.items()
            for key in ("acc", "tokens", "eps3", "truncated")
        },
    }
