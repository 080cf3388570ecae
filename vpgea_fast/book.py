"""The book of metrics: what every number that a run writes means, and in which unit.

One table for metrics.jsonl, one for eval.json and one for paths.jsonl. The report's tooltips,
`vpgea keys --metrics` and docs/metrics.md come from here; tests/test_book.py holds the tables equal
to what runs write, in both directions.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vpgea_fast.objectives.guards import GUARDS

MODES = ("sampled", "greedy")
"""The two ways in which an evaluation draws answers."""
LOGGED = ("acc", "tokens", "eps3", "truncated")
"""What a step's line repeats of an evaluation during training."""


class Metric(NamedTuple):
    """Unit and meaning of one key."""

    unit: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} [{self.unit}]"


class Chapter(NamedTuple):
    """Metrics that are logged together: when, and each one's meaning."""

    title: str
    when: str
    metrics: dict[str, Metric]


def _table(text: str) -> dict[str, Metric]:
    """Metrics by their key, from lines `key | unit` with the meaning indented below each.

    ValueError for a key that metrics.jsonl would refuse, and for an entry without a meaning."""
    entries = re.findall(r"^([a-z][a-z0-9_]*) \| (.+)\n((?: +.+\n)+)", text, re.MULTILINE)
    heads = re.findall(r"^(\S.*)$", text, re.MULTILINE)
    if wrong := set(heads) - {f"{key} | {unit}" for key, unit, _ in entries}:
        raise ValueError(
            f"book.py: got {sorted(wrong)[0]!r}, expected `key | unit` and its meaning indented "
            "below; a key has small letters, digits and underscores"
        )
    return {key: Metric(unit, " ".join(meaning.split())) for key, unit, meaning in entries}


GUARDED = "".join(
    f"""{name} | share
    Share of the teacher's paths that objective.{guard.key} rejects and that pass every filter but
    the guards.
"""
    for name, guard in GUARDS.items()
)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


# Keys of Evaluator.run's result for one mode; report and console read them by these names.
EVALUATION = Chapter(
    "eval.json",
    "Before and after training: `step`, and an object for each mode, `sampled` and `greedy`. "
    "Under `benchmarks` the same keys stand once for each benchmark.",
    _table("""
acc | share
    Share of answers that are right; mean over benchmarks.
acc_low | share
    Lower end of the 95 % bootstrap interval of acc, over questions.
acc_high | share
    Upper end of the 95 % bootstrap interval of acc, over questions.
tokens | tokens
    Mean generated tokens per answer, thought included and cut ones too; mean over benchmarks.
eps3 | %² per token
    (100 acc)² / tokens, mean over benchmarks.
eps3_mean | %² per token
    (100 acc)² / tokens of the means over benchmarks; of several benchmarks only.
truncated | share
    Share of answers that the token limit cut, mean over benchmarks; a cut thought counts as
    wrong.
n | answers
    Answers drawn.
questions | questions
    Questions asked.
dropped | questions
    Questions of the files that were left out, with reasons in the run's output.
errors | answers
    Answers that the engine gave up.
"""),
)

# Columns that every path has, then those of the objective's `Terms.path_scores`.
PATHS = Chapter(
    "paths.jsonl",
    "One line per path, for the first metrics.paths_per_step paths of each stream; those of "
    "replaced questions come last, without scores.",
    _table("""
step | step
    The step that drew the path, from 1.
question_id | text
    The question's id.
stream | text
    `posterior`: drawn from the teacher's prompt; `prior`: from the student's; `reference`: from the
    student's, by the reference policy.
index | number
    The path's place among those of its question, from 0.
length | tokens
    Tokens of the thought, its closing token included.
finish | text
    `stop`: ended by itself; `length`: cut at the token limit; `error`: given up by the engine.
closed | true or false
    Whether the thought ended with its closing token.
correct | true or false
    Whether the sampled answer is right; null without rollout.full_answer.
replaced | true or false
    Whether its question made room for another (train.resample_rounds), and trained nothing.
prompt | text
    Hash of the ids of the prompt that it was drawn from.
temperature | ratio
    Temperature at which it was drawn.
reward | nats
    R of the path, 0 where it was rejected. GRPO: eta where right, else 0.
eta | ratio
    Length factor (base length / length)^alpha; above 1 for a path shorter than the base.
utility | nats
    S = R eta, what the advantage compares.
advantage | standard deviations
    (S - mean) / (std + eps) within the question's group; 0 in a group without spread.
u | nats
    U = log P(answer given question and path) in the student's view.
log_utility | nats
    U + log eta without clip, what the ELBO averages.
share | share
    Weight of the path within its question, adding up to 1 (vr, vr_theta, vr_phi).
answered | share
    How likely a right answer is behind the thought, by objective.estimator (vr, vr_theta, vr_phi).
log_ratio | nats
    Of a hinted thought, log pi - log q (vr, vr_theta, vr_phi).
text | text
    The thought, decoded.
answer | text
    What was sampled after the thought, decoded.
ids | token ids
    The thought as the engine drew it.
logps | nats
    The sampler's log-prob of each of these; null where the engine gave none.
answer_ids | token ids
    What was sampled after the thought, as the engine drew it.
answer_logps | nats
    The sampler's log-prob of each of these.
attempt_ids | token ids
    Each text among the answers sampled behind the thought, once (scoring.answer_samples).
attempt_right | true or false
    Whether each of these texts is right.
attempts | numbers
    Which text each sampled answer is, from 0, in their order.
answer_temperature | ratio
    Temperature at which these answers were sampled.
"""),
)

STEP = (
    # From `Gradients.update`, and `diagnostics.row_metrics` of the rows that it trained.
    Chapter(
        "Step and update",
        "Every step; kl_gated where a row was distilled.",
        _table("""
step | step
    The number of this step, from 1.
lr | rate
    Learning rate of this step.
loss | nats
    What the update minimised, constants included: loss_pg + loss_distill.
loss_pg | nats
    Sum over rows in their own view of coefficient times log-prob, summed over tokens. Of a policy
    gradient: its clipped loss, KL included.
loss_answer | nats
    Sum over reference answers behind thoughts of coefficient times log-prob; with
    objective.train_answer, objective.target of verifree, vr and vr_theta.
loss_theta | nats
    Sum over weighed hinted thoughts, in the student's view, of coefficient times log-prob (vr,
    vr_theta).
loss_phi | nats
    The hinted policy's loss: sum over rows in the teacher's view of coefficient times log-prob, or
    of its clipped loss (vr, vr_phi).
loss_prior_pg | nats
    Policy gradient of the student's own paths; with objective.prior_pg.
loss_distill | nats
    Sum over distilled rows of coefficient times (log p - log q), beta included; 0 where the
    views agree, null where a recorded path's log q is not known.
grad_norm | norm
    Norm of the whole gradient before clipping, over all processes; 0 without a gradient, null
    where not finite.
lr_posterior | rate
    Learning rate of the posterior policy, where it is a model of its own.
grad_norm_posterior | norm
    Norm of its gradient before clipping, as grad_norm is of the policy's; where one of the two is
    not finite, neither policy is updated.
skipped | 0 or 1
    1: no update, since no path had a gradient or it was not finite; 0: updated.
kl_gated | nats per token
    Mean of log q - log p over the tokens of distilled rows: how far the student is from the
    gated paths.
"""),
    ),
    # From `diagnostics.batch_metrics`; of a stream that is not drawn there are none.
    Chapter(
        "Paths and answers",
        "Every step, over the paths of each stream that the objective draws. "
        "Accuracies need rollout.full_answer; u_* need an objective that scores answers.",
        _table("""
len_prior | tokens
    Mean thought length of the student's paths, cut ones included.
len_post | tokens
    Mean thought length of the teacher's paths, cut ones included.
len_reference | tokens
    Mean thought length of the reference policy's paths, cut ones included; of objectives that draw
    them only.
trunc_reference | share
    Share of the reference policy's paths whose thought was cut at the token limit.
trunc_prior | share
    Share of the student's paths whose thought was cut at the token limit.
trunc_post | share
    Share of the teacher's paths whose thought was cut at the token limit.
u_prior | nats
    Mean U = log P(answer given path), student view, over the student's paths with finite U.
u_prior_p10 | nats
    10th percentile of U over the student's paths.
u_prior_p50 | nats
    Median of U over the student's paths.
u_post | nats
    Mean U = log P(answer given path), student view, over the teacher's paths with finite U.
u_post_p10 | nats
    10th percentile of U over the teacher's paths.
u_post_p50 | nats
    Median of U over the teacher's paths.
len_data | tokens
    Mean thought length of the responses that the data gives, where the objective imitates those
    (sft): then there is no metric of the student's paths.
acc_data | share
    Share of these whose answer is right: what the checker thinks of the data.
acc_student | share
    Share of the student's paths whose sampled answer is right.
acc_teacher | share
    Share of the teacher's paths whose sampled answer is right.
acc_reference | share
    Share of the reference policy's paths whose sampled answer is right.
eps3_student | %² per token
    (100 acc_student)² / mean generated tokens of the student's paths, answers included.
paths_error | paths
    Paths that the engine gave up, and one per question whose scoring answers it gave up.
groups_dropped | questions
    Questions left out of update and means, because the engine gave up a path or a scoring
    answer.
verdicts_missing | answers
    Distinct sampled answers that nothing judged: it took more than verify.timeout_s, or ended its
    process. They count as wrong. Absent where no answer is judged.
paths_written | lines
    Lines that this step wrote to paths.jsonl.
"""),
    ),
    # From `Terms.metrics` of the objective; the counts of lost paths are the collector's.
    Chapter(
        "Utility, advantage and gate",
        "Every step. gate_rate, len_gated*, utility and u_replaced belong to vpgea.",
        _table(f"""
accept_rate | share
    Share of the teacher's paths with R above 0; grpo: share of paths that are right.
gate_rate | share
    Share of the teacher's paths with a positive advantage: those that the student is trained
    on.
len_gated | tokens
    Mean length of the gated paths of all questions; null where none is gated. Groups with many
    gated paths weigh more.
len_gated_ratio | ratio
    Mean over gated paths of length / mean length of the group; below 1 where the gate prefers
    short paths.
{GUARDED}path_kl | nats
    Mean over the teacher's paths of log q - log pi of a whole thought; with objective.kappa.
guard_nats | nats
    Mean over the teacher's paths of what the guard compares with objective.leak_limit; with
    objective.leak_guard.
groups_all_rejected | questions
    Questions whose paths all have R = 0 (grpo: are all wrong; vr: have no weight).
groups_zero_var | questions
    Questions without a gradient: every advantage is exactly 0.
std_s | nats
    Standard deviation of S within a group, mean over questions (grpo: of its reward).
utility | nats
    Mean S = R eta over the teacher's paths.
u_replaced | paths
    Paths of both streams whose U was not finite and became objective.u_min.
net_token_push | tokens
    Sum over paths of advantage times length; below 0 the update favours shorter paths.
length_limit | tokens
    Mean over questions of the limit that a length reward holds their paths to (think_prune,
    laser_d, laser_de).
answer_stated | share
    Share of right paths whose thought states the answer (length reward lc_r1); null where none is
    right.
answer_logp | nats per token
    Mean log-prob of the answer's tokens behind the teacher's thoughts under the reference policy,
    with answer_min (rlt).
teacher_distance | nats per token
    Mean log q - log p of the teacher's thoughts, p of the reference policy, with kl_max (rlt).
tokens_replaced | tokens
    Tokens of questions that train.resample_rounds replaced; 0 without resampling.
"""),
    ),
    # From objectives/bounds.py.
    Chapter(
        "Variational Reasoning",
        "Every step of vr, vr_theta and vr_phi. f is how likely a right answer is behind a "
        "thought, by objective.estimator; 0 where the thought was cut. vr_phi_* are of unhinted "
        "paths, the others of hinted ones.",
        _table("""
vr_elbo | nats
    Mean of log f + log pi - log q of whole thoughts, over the paths with f above 0. The ELBO where
    all have; above it else.
vr_bound | nats
    The estimate of L_K: log of a question's mean f pi / q, whole thoughts. Mean over the questions
    with a path of f above 0.
vr_log_ratio | nats per token
    Mean over paths of log pi - log q per token: how unlikely the student finds hinted thoughts.
vr_answered | share
    Mean f.
vr_answered_none | share
    Share of the paths with f = 0.
vr_answered_all | share
    Share of the paths with f = 1.
vr_ess | paths
    1 / sum of squared weights of a question, mean over questions with weights: 1, one path has all;
    K, all are equal.
vr_share_max | share
    Largest weight of a question, mean over questions with weights.
vr_phi_answered | share
    Mean f.
vr_phi_answered_none | share
    Share of the paths with f = 0.
vr_phi_answered_all | share
    Share of the paths with f = 1.
vr_phi_ess | paths
    As vr_ess.
vr_phi_share_max | share
    As vr_share_max.
vr_phi_skipped | questions
    Questions none of whose paths has a weight.
"""),
    ),
    # From `advantage.posterior_monitors`.
    Chapter(
        "Monitors of the theory",
        "Every step of vpgea, means over questions (arXiv 2605.11019, Proposition 1). "
        "The last three need objective.prior_samples of 2 or more.",
        _table("""
adv_post | likelihood
    Mean L eta of the teacher's paths minus that of the student's, L = exp U; below 0 there is
    nothing to distil.
e_qstar_s | likelihood
    Mean L eta under the exact posterior, estimated by weights L on the student's paths.
cov_ls | likelihood²
    Covariance of L and L eta over the student's paths of a question.
prop1_gap | likelihood
    What the exact posterior would gain over the student: cov_ls / mean L.
share_cov_negative | share
    Share of questions with a negative covariance: there objective.alpha is too large.
"""),
    ),
    # From `diagnostics.mismatch`, `rows.truncated_ratios` and rollout/probe.py.
    Chapter(
        "Engine against trainer",
        "mismatch_* with every update, importance_capped with rollout.importance_cap; "
        "kl_reference and clipped where a policy gradient makes several updates or holds to one. "
        "probe_* after a hand-over of weights (vLLM, or a sharded model), by rollout.probe_every.",
        _table("""
mismatch_mean | ratio
    Mean exp of the absolute log-prob gap of engine and trainer, over trained tokens in their
    own view; 1: equal.
mismatch_max | nats
    Largest absolute log-prob gap of engine and trainer over those tokens; 0: equal.
mismatch_ratio_min | ratio
    Smallest p_trainer / p_engine over those tokens; 1: equal.
mismatch_ratio_max | ratio
    Largest p_trainer / p_engine over those tokens; 1: equal.
mismatch_outside | share
    Share of those tokens whose ratio is outside 0.9 to 1.1.
kl_reference | nats per token
    Mean k3 estimate of KL(policy, reference policy) over the tokens of trained paths, before the
    first update; with kl_coef above 0.
clipped | share
    Share of tokens with a ratio that clipping leaves out, mean over the updates of the step; with
    several updates, or a reference policy.
importance_capped | share
    Share of trained tokens whose ratio p_trainer / p_engine the cap cut.
probe_mean | nats
    Mean absolute log-prob gap of engine and trainer over greedy probe tokens, after a
    hand-over.
probe_max | nats
    Largest absolute log-prob gap of engine and trainer over the probe tokens.
prefix_hit_rate | share
    Share of prompt tokens that the engine found in its cache; 0 for engine hf.
rest_freed_mib | MiB
    Device memory that the engine gave back between sampling and training; 0 for engine hf.
"""),
    ),
    # From `diagnostics.view_divergence` and `Gradients.norms`: passes of their own.
    Chapter(
        "Diagnostics of the two views",
        "Every metrics.diag_every steps, over all tokens of the teacher's paths (vpgea).",
        _table("""
kl_q_pi | nats per token
    KL(q || pi): mean over tokens of the teacher's log-prob minus the student's; 0: the views
    agree.
kl_q_pi_max | nats
    Largest such difference of one token.
entropy_teacher | nats per token
    Entropy of the next token under the teacher's prompt, mean over tokens.
entropy_student | nats per token
    Entropy of the next token under the student's prompt, mean over tokens.
hint_token_rate | share
    Share of tokens that are 5 nats likelier under the hint, the first of each path not
    counted.
elbo | nats
    Mean of log L + log eta minus KL(q || pi) per path: a lower bound of the log expected
    utility.
early_answer_rate | share
    Share of the teacher's paths whose first fifth spells the answer; watch its change, not its
    level.
grad_norm_pg | norm
    Gradient norm of the policy-gradient rows alone; absent without such rows.
grad_norm_answer | norm
    Gradient norm of the reference answers alone; absent without such rows.
grad_norm_theta | norm
    Gradient norm of the weighed hinted thoughts alone; absent without such rows.
grad_norm_phi | norm
    Gradient norm of the hinted policy's rows alone; absent without such rows.
grad_norm_prior_pg | norm
    Gradient norm of the student's own paths alone; absent without such rows.
grad_norm_distill | norm
    Gradient norm of the distilled rows alone; absent without such rows.
"""),
    ),
    # From `Measure.cost` and `diagnostics.plan_metrics`.
    Chapter(
        "Work, speed and memory",
        "Every step; plan_* with every update.",
        _table("""
tokens_generated | tokens
    Tokens sampled in this step, those of replaced questions and of answers that score a thought
    included; 0 of responses that the data gives.
tokens_trained | tokens
    Prompt and thought tokens of all rows that have a gradient.
tokens_gated_off | tokens
    Prompt and thought tokens of rows that were not trained, because their coefficient is 0.
tokens_per_s | tokens per s
    (tokens_generated + tokens_trained) / seconds of all phases of the step.
train_tokens_per_s | tokens per s
    Rate of the update: tokens_trained per second of time_train_s, over all processes.
mfu | share
    Model FLOPs per second of the update, of the bfloat16 peak of all devices; null for unknown
    devices.
peak_memory_mib | MiB
    Peak memory so far, maximum over processes (device memory; host RSS on a CPU).
plan_rounds | micro-batches
    Micro-batches of each process in this update.
plan_dummy_tokens | tokens
    Tokens of empty micro-batches, with which a process keeps pace with the others.
plan_flops_imbalance | ratio
    Largest work of a process / mean work of a process; 1: balanced.
plan_flops_waiting | ratio
    Sum over rounds of the largest work of a process / mean work of a process; 1: nobody waits.
time_rollout_s | s
    Sampling of the paths.
time_score_s | s
    Scoring: U of every path, and verification of answers.
time_logps_s | s
    Log-probs that the objective needs beside U and its leak guard: kappa's, or the reference
    policy's.
time_guard_s | s
    Log-probs that its leak guard alone reads; with objective.leak_guard.
time_guard_ratio | share
    What the leak guard cost: time_guard_s / seconds of all phases of the step; 0 where kappa reads
    the same. With objective.leak_guard.
time_advantage_s | s
    Advantages and coefficients.
time_importance_s | s
    Forward for the importance weights; about 0 without rollout.importance_cap.
time_diagnose_s | s
    Diagnostics; the costly ones every metrics.diag_every steps.
time_train_s | s
    Forward, backward and optimiser step.
time_sync_s | s
    Hand-over of the weights to the engine, and its probe.
"""),
    ),
    Chapter(
        "Evaluation during training",
        "Every eval.every steps, in the line of the step that follows.",
        {
            "eval_step": Metric("step", "The last step whose update the evaluated weights have."),
            **{
                f"eval_{mode}_{key}": Metric(unit, f"{mode.capitalize()} answers: {_lower(text)}")
                for mode in MODES
                for key, (unit, text) in EVALUATION.metrics.items()
                if key in LOGGED
            },
        },
    ),
)
"""metrics.jsonl: one line per step, of the whole step over all processes."""

METRICS = {key: metric for chapter in STEP for key, metric in chapter.metrics.items()}
