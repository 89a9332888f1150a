"""What a run needs of memory, estimated before it starts.

Plain arithmetic on shapes and settings. What DeepSpeed holds, and when, is read off its source (0.19.8, ZeRO stage 3);
each assumption stands at the line that makes it. `benchmarks/memory.md` holds the figures against measured peaks.

Shape letters: P elements of all parameters, S elements of a rank's shards, M units, N units of a group, W ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

from scale_prune.config import get
from scale_prune.core import ROWS_AT_ONCE
from scale_prune.criteria import freezes, observes
from scale_prune.preflight.job import FP32, PREFETCH_BUCKET, REDUCE_BUCKET, SUB_GROUP, Job
from scale_prune.preflight.round_needs import GRAM_MATRICES, num_observed, round_memory, whitening_memory
from scale_prune.preflight.sizes import criterion_state, kept_gathered, needs, persistent, products, sampled_tokens

KEPT = "all, kept"


@dataclass(frozen=True)
class Part:
    """Some bytes of a rank: what they are for, and where they lie ("GPU" or "host")."""

    name: str
    place: str
    size: int


PROCESS = Part("process", "host", 550 * 2**20)
"""One that runs a model of next to no size: imports, tokenizer, text; see benchmarks/memory.md."""


def memory(job: Job) -> dict[str, list[Part]]:
    """Return what a rank holds in each phase of a run; the peak is the largest phase.

    A phase's parts are those that live together at its worst moment; evaluation needs no more than what is there. A
    process without a GPU has one more phase, `KEPT`: with the settings of launch/setup.sh glibc keeps what is freed,
    and the phases of a step hardly find room in each other's blocks, so that they add up.
    """
    always = [PROCESS, *_buffers(job), *_scores(job), *_teacher(job)]
    held = [*always, *_states(job, job.shards, "")]
    own = _phases(job)
    kept = [*chain.from_iterable(own.values())]
    if added := round_memory(job):
        own["round"] = [Part(name, job.place(), size) for name, size in added.items()]
        kept += own["round"]
        own["round, reading"] = _reading(job, added[GRAM_MATRICES])
    phases = {"loading": [PROCESS, *_loading(job)]}
    if whitening := _whitening(job):
        phases["whitening"] = whitening
    phases |= {name: [*held, *parts] for name, parts in own.items()}
    if job.pruning.remaining < 1:
        phases["compaction"] = [*always, *_compaction(job)]
    if job.recovers and not job.trains:
        phases["recovery"] = _recovery(job)
    if not job.on_gpu:
        later = [phases[name] for name in ("compaction", "recovery") if name in phases]
        phases[KEPT] = [*held, *kept, _growth(later, held)]
    return {name: [part for part in parts if part.size] for name, parts in phases.items()}


def _whitening(job: Job) -> list[Part]:
    """Return what is there while the dense model reads the calibration text, before there is an optimizer."""
    if not (added := whitening_memory(job)):
        return []
    device = job.place()
    parts = [Part(name, device, size) for name, size in added.items()]
    parameters = Part("parameters", job.place("offload_param"), job.shards * job.width)
    return [PROCESS, parameters, Part("gathered parameters", device, _gathered(job)), *parts]


def _recovery(job: Job) -> list[Part]:
    """Return what is there while the smaller model is trained, where nothing was trained before."""
    after, device = replace(job, trains=True), job.place()
    return [
        PROCESS,
        *_buffers(after),
        *_teacher(job),
        *_states(after, job.shard_of(job.num_pruned), "smaller "),
        Part("gathered parameters", device, _gathered(job)),
        Part("activations", device, job.rehearsed.activations),
        Part("temporaries", device, max(_reducing(after), _stepping(after))),
    ]


def _growth(later: Sequence[list[Part]], held: list[Part]) -> Part:
    """Return what compaction and what comes after it need beyond the blocks of what is freed."""
    most = max((total(parts, "host") for parts in later), default=0)
    return Part("compaction", "host", max(0, most - total(held, "host")))


def _phases(job: Job) -> dict[str, list[Part]]:
    """Return what each phase adds to what an engine and its pruner hold all the time."""
    device = job.place()
    if not job.trains:
        goes_back = freezes(job.pruning) or observes(job.pruning, trains=job.trains) or needs(job, "output_grad")
        return {
            "forward": [
                Part("gathered parameters", device, _gathered(job)),
                Part("activations", device, job.rehearsed.activations if goes_back else job.rehearsed.reading),
                Part("gradients", device, FP32 * num_observed(job)),
                Part("temporaries", device, _observing(job)),
            ]
        }
    passing = [
        Part("gathered parameters", device, _gathered(job)),
        Part("activations", device, job.rehearsed.activations),
    ]
    return {
        "forward, backward": [*passing, Part("similarity", device, _sampled(job))],
        "reduce-scatter": [Part("similarity", device, _sampled(job)), Part("copy of a bucket", device, _reducing(job))],
        "scores, masks": [
            Part("similarity", device, 2 * _sampled(job) + _cosines(job)),
            Part("temporaries", device, _scoring(job)),
        ],
        "optimizer step": [Part("similarity", device, _sampled(job)), Part("temporaries", device, _stepping(job))],
    }


def _reading(job: Job, matrices: int) -> list[Part]:
    """Return what is there while calibration text is read, for Gram matrices of so many bytes."""
    passed = job.rehearsed.activations if needs(job, "output_grad") else job.rehearsed.reading
    parts = {"gathered parameters": _gathered(job), "activations": passed, GRAM_MATRICES: matrices}
    return [Part(name, job.place(), size) for name, size in parts.items()]


def total(parts: Iterable[Part], place: str) -> int:
    """Return the bytes in one place."""
    return sum(part.size for part in parts if part.place == place)


def peak(phases: dict[str, list[Part]], place: str) -> int:
    """Return the bytes of the largest phase in one place."""
    return max(total(parts, place) for parts in phases.values())


def _states(job: Job, shards: int, prefix: str) -> list[Part]:
    """Return what an engine holds all the time: working copy, master, averaged gradients, moments.

    In fp32 the master is a second copy: DeepSpeed would share one only on a GPU, and then masks could not hold.
    An optimizer on the host has a float32 copy of the gradients beside it.
    """
    optimizer = job.place("offload_optimizer")
    offloaded = job.on_gpu and optimizer != "GPU"
    working = Part(f"{prefix}parameters", job.place("offload_param"), shards * job.width)
    if not job.trains:
        return [working]
    return [
        working,
        Part(f"{prefix}master", optimizer, shards * FP32),
        Part(f"{prefix}gradients", optimizer, shards * (job.gradient_width + FP32 * offloaded)),
        Part(f"{prefix}optimizer", optimizer, shards * FP32 * job.moments),
    ]


def _teacher(job: Job) -> list[Part]:
    """Return the teacher's shards, which are taken to be as large as the model's."""
    return [Part("teacher", job.place("offload_param"), job.shards * job.width * job.has_teacher)]


def _buffers(job: Job) -> list[Part]:
    """Return the model's buffers and the bucket in which gradients wait for their reduce-scatter."""
    contiguous = get(job.ds_config, "zero_optimization.contiguous_gradients") is not False
    bucket = job.zero("reduce_bucket_size", REDUCE_BUCKET) if contiguous else 0
    return [
        Part("buffers of the model", job.place(), job.rehearsed.buffers),
        Part("reduce bucket", job.place(), bucket * job.width * job.trains),
    ]


def _reducing(job: Job) -> int:
    """Return the bytes of a bucket's copy, cut by ranks.

    A gradient that is larger than the bucket travels alone, so the copy can be of that size. The largest one is the
    embedding's, which is whole only after the last layer's backward pass, when the activations are gone.
    """
    bucket = job.zero("reduce_bucket_size", REDUCE_BUCKET)
    return max(min(bucket, job.num_parameters), max(job.rehearsed.numels)) * job.width if job.world_size > 1 else 0


def _loading(job: Job) -> list[Part]:
    """Return the shards, the tensor that is made whole before it is cut, and a slice of it on its way from the file.

    The file is taken to be of safetensors, in float32 at most.
    """
    return [
        Part("parameters", job.place("offload_param"), job.shards * job.width),
        Part("buffers of the model", job.place(), job.rehearsed.buffers),
        Part("gathered parameters", job.place(), max(job.rehearsed.numels) * job.width),
        Part("slice of a file", "host", job.shard_of(max(job.rehearsed.numels)) * FP32),
    ]


def _gathered(job: Job) -> int:
    """Return the bytes of parameters that are whole at one time: kept ones, the one in use, and prefetched ones twice.

    On a single rank the shard is the whole.
    """
    if job.world_size == 1 and job.place("offload_param") == job.place():
        return 0
    prefetched = job.zero("stage3_prefetch_bucket_size", PREFETCH_BUCKET)
    elements = min(job.num_parameters, kept_gathered(job) + persistent(job) + max(job.rehearsed.numels) + prefetched)
    return (elements + min(prefetched, job.num_parameters)) * job.width


def _scores(job: Job) -> list[Part]:
    """Return scores and masks of all units, the criterion's state of the owned ones, and running products."""
    owned = 3 * FP32 * job.layout.per_rank  # similarity, weights in the mean, totals
    scores = criterion_state(job) + owned + job.layout.num_units * (FP32 + 2)  # masks now and before
    return [Part("scores", job.place(), scores), Part("similarity", job.place(), products(job))]


def _sampled(job: Job) -> int:
    """Return the bytes of the activations that a rank samples, of all groups."""
    if not needs(job, "activation") and (job.pruning.rounds or not needs(job, "activity")):
        return 0
    return sampled_tokens(job) * sum(group.num_features for group in job.groups) * job.width


def _cosines(job: Job) -> int:
    """Return the bytes of one group's gathered sample, also in float32, and of a block of products, thrice."""
    if not needs(job, "activation"):
        return 0
    widest = max(group.num_units for group in job.groups)
    features = max(group.num_features for group in job.groups)
    gathered = job.world_size * sampled_tokens(job) * features * (job.width + FP32)
    return gathered + 3 * FP32 * min(ROWS_AT_ONCE, job.layout.per_rank, widest) * widest


def _scoring(job: Job) -> int:
    """Return the bytes of the largest temporaries on shards.

    A share makes float32 of a gradient, its product with the weight, and a padded copy of that.
    """
    members = [prod(member.shape) for group in job.groups for member in group.members]
    return 3 * FP32 * job.shard_of(max(members))


def _observing(job: Job) -> int:
    """Return the bytes of the largest gradient that no step follows, in float32, padded and cut; and its share's."""
    members = [prod(member.shape) for group in job.groups for member in group.members]
    return max(2 * FP32 * max(members), _scoring(job)) if num_observed(job) else 0


def _stepping(job: Job) -> int:
    """Return the bytes that an optimizer step adds, for one sub-group of shards.

    The gradients are joined and turned into float32. PyTorch's Adam makes 2 temporaries of their size on a CPU and 1
    on a GPU; DeepSpeed's own optimizers make none, and on the host the gradients lie ready.
    """
    if job.place("offload_optimizer") != job.place():
        return 0
    in_torch = bool(get(job.ds_config, "optimizer.params.torch_adam"))
    temporaries = (1 if job.on_gpu else 2) if in_torch else 0
    return min(job.shards, job.zero("sub_group_size", SUB_GROUP)) * FP32 * (1 + temporaries)


def _compaction(job: Job) -> list[Part]:
    """Return what there is of engines: the old working copy, slices that are carried over, the smaller engine.

    The old masters, moments and gradients are gone by then. The one tensor that is gathered at a time is small against
    the rest, unless there are very many ranks. Training on afterwards needs less than before.
    """
    pruned = job.shard_of(job.num_pruned)
    return [
        Part("parameters", job.place("offload_param"), job.shards * job.width),
        Part("carried slices", "host", pruned * FP32 * (1 + job.moments) * job.trains),
        *_states(replace(job, trains=job.trains or job.recovers), pruned, "smaller "),
    ]
