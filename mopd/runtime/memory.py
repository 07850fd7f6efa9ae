"""Estimate of every member's memory, from configs alone: `mopd plan` compares it with a device's.

Exact: weights, gradients and Adam's state of the student (up to the padding of Megatron's gradient
buffers), and the weights of engines of known architectures. Estimates: activations, caches and
logits, which depend on the length of texts. Guesses: see `ASSUMPTIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mopd.config.check_losses import losses_in_use
from mopd.config.cluster import DEVICE_NAMES
from mopd.config.model_shape import ModelShape, find_model_config, read_model_config
from mopd.config.model_size import ModelSize, read_model_size
from mopd.config.pools import ROLLOUT, STUDENT, backends_of, is_actor
from mopd.config.schema import RunConfig
from mopd.runtime import memory_student
from mopd.runtime.memory_engine import MAX_BATCHED_TOKENS, engine_parts
from mopd.runtime.memory_student import StudentJob, frozen_bytes, projection_bytes, student_parts
from mopd.runtime.placement import Plan, Pool, Slot

GB = 10**9
ASSUMPTIONS = (
    "Exact: weights, gradients, optimizer. Estimated: activations (2205.05198, with the layers' "
    "own terms), logits, KV cache. Guessed: prompts of "
    f"{memory_student.PROMPT_TOKENS} tokens and answers of rollout.max_new_tokens, "
    f"{memory_student.ENTRIES_PER_TOKEN:g} projection entries a token, "
    f"{memory_student.LOSS_BLOCKS} temporaries in a loss, "
    f"{MAX_BATCHED_TOKENS} tokens in vLLM's batch, an even load of experts. Left out: what the "
    "device's own libraries take (1 to 2 GB), fragmentation, temporaries of a layer's backward "
    "pass, and that vLLM fills its device with cache up to --gpu-memory-utilization."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What is known of the models; an owner whose model is not known is left out."""

    student: ModelShape
    sizes: Mapping[str, ModelSize]  # by owner; of the sampler the student's
    inside: Mapping[str, ModelShape]  # teachers of type megatron


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Members of one owner that need the same, per device."""

    owner: str
    what: str  # of the student's ranks: which
    pool: str
    numbers: tuple[int, ...]
    parts: Mapping[str, int]  # bytes by kind

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def read_shapes(config: RunConfig) -> Shapes:
    """Read config.json of every model, or of its entry in `recipes/models`.

    Raises ConfigError for a model whose size cannot be told.
    """
    assert config.student.model is not None
    path = find_model_config(config.student.model)
    sizes = {ROLLOUT: read_model_size(path, key="student.model")}
    inside: dict[str, ModelShape] = {}
    for name, teacher in config.teachers.items():
        if teacher.model is None or teacher.weight == 0:
            continue
        owner = f"teachers.{name}"
        own = find_model_config(teacher.model, key=f"{owner}.model")
        sizes[owner] = read_model_size(own, key=f"{owner}.model")
        if teacher.backend.type == "megatron":
            inside[owner] = read_model_config(own.parent)
    return Shapes(student=read_model_config(path.parent), sizes=sizes, inside=inside)


def estimate(config: RunConfig, plan: Plan, shapes: Shapes) -> tuple[Share, ...]:
    """Bytes by kind of every member, those with the same needs together; the student first."""
    shares = list(_student(config, plan, shapes))
    for pool in plan.pools:
        for owner in dict.fromkeys(member.owner for member in pool.members):
            if owner == STUDENT or owner not in shapes.sizes:
                continue
            shares.append(
                Share(
                    owner=owner,
                    what="engine",
                    pool=pool.name,
                    numbers=tuple(member.number for member in plan.members(owner)),
                    parts=engine_parts(config, owner, shapes.sizes[owner], device=pool.device),
                )
            )
    return tuple(shares)


def _student(config: RunConfig, plan: Plan, shapes: Shapes) -> list[Share]:
    """The ranks of every stage; leads apart where they hold models of their own."""
    pool, ranks = plan.pools[0], plan.members(STUDENT)
    kind = DEVICE_NAMES[pool.device]
    job = StudentJob(config=config, shape=shapes.student, num_ranks=len(ranks), device_type=kind)
    per_stage, lead_every = len(ranks) // job.pp, job.tp * job.cp
    shares: list[Share] = []
    for stage in range(job.pp):
        parts = student_parts(job, stage=stage) | _on_all_ranks(job, plan, shapes, stage)
        numbers = range(stage * per_stage, (stage + 1) * per_stage)
        leads = [n for n in numbers if stage == 0 and n % lead_every == 0]
        own = _on_leads(config, plan, shapes, pool)
        name = "rank" if job.pp == 1 else f"stage {stage}"
        for what, some, more in (
            (f"{name}, lead", leads if own else [], own),
            (name, [n for n in numbers if not own or n not in leads], {}),
        ):
            if some:
                shares.append(
                    Share(
                        owner=STUDENT,
                        what=what,
                        pool=pool.name,
                        numbers=tuple(some),
                        parts=parts | more,
                    )
                )
    return shares


def _on_all_ranks(job: StudentJob, plan: Plan, shapes: Shapes, stage: int) -> dict[str, int]:
    """Projections in the last stage, and teachers of type megatron; of those in host memory while
    nobody asks (`offload`) the largest."""
    config, parts = job.config, {}
    if stage == job.pp - 1 and "ctkd" in losses_in_use(config):
        teachers = [size for owner, size in shapes.sizes.items() if owner != ROLLOUT]
        parts["projection"] = sum(projection_bytes(job, size.vocab_size) for size in teachers)
    resident, visiting = 0, 0
    for owner, shape in shapes.inside.items():
        backend = config.teachers[owner.partition(".")[2]].backend
        width = memory_student.DTYPE_BYTES[backend.dtype or config.student.dtype]
        needed = frozen_bytes(replace(job, shape=shape), stage=stage, width=width)
        resident += 0 if backend.offload else needed
        visiting = max(visiting, needed if backend.offload else 0)
    if resident + visiting:
        parts["teachers inside"] = resident + visiting
    return parts


def _on_leads(config: RunConfig, plan: Plan, shapes: Shapes, pool: Pool) -> dict[str, int]:
    """The sampler and the teachers that are a lead's own: all of them stay, one computes."""
    weights, most = 0, 0
    for owner in plan.inside:
        backend = backends_of(config)[owner]
        samples = owner == ROLLOUT and backend.type in ("hf", "vllm", "replay")
        if owner in shapes.sizes and (samples or backend.type == "hf"):
            parts = engine_parts(config, owner, shapes.sizes[owner], device=pool.device)
            weights += parts.pop("weights")
            most = max(most, sum(parts.values()))
    return {"sampler, teachers": weights + most} if weights else {}


def too_large(config: RunConfig, plan: Plan, shares: tuple[Share, ...]) -> list[str]:
    """A sentence for every share that a device does not hold, with what to change."""
    memory = config.cluster.device_memory_gb
    if memory is None:
        return []
    kind = plan.pools[0].device
    pools = {pool.name: pool for pool in plan.pools}
    said = []
    for share in shares:
        if share.total > memory * GB and pools[share.pool].device == kind:
            largest = max(share.parts, key=lambda part: share.parts[part])
            said.append(
                f"{share.owner} ({share.what}) needs {share.total / GB:.1f} GB, most of it "
                f"{largest}, and a device has {memory:g}: {_remedy(config, share, largest)}"
            )
    return said


def _remedy(config: RunConfig, share: Share, largest: str) -> str:
    if share.owner != STUDENT:
        key = f"{share.owner}.backend"
        if largest == "weights":
            return f"raise {key}.server.tensor_parallel_size, or serve a quantized model"
        if backends_of(config)[share.owner].type == "hf":
            inside = "" if is_actor(config, share.owner) else f"lower {key}.batch_size, or "
            return f"{inside}set {key}.type=vllm"
        return (
            "lower rollout.max_new_tokens, or raise backend.server.replicas"
            if share.owner == ROLLOUT
            else f"lower {key}.max_outstanding or rollout.max_new_tokens"
        )
    section = config.student
    remedies = {
        "activations": "lower train.micro_batch_size or train.max_tokens_per_micro_batch"
        + ("" if section.recompute.granularity else ", or set student.recompute.granularity=full"),
        "optimizer": "raise student.parallel.tensor_model_parallel_size"
        if section.optimizer.use_distributed_optimizer
        else "set student.optimizer.use_distributed_optimizer=true",
        "logits block": "raise student.parallel.tensor_model_parallel_size"
        if section.fused_head
        else "set student.fused_head=true",
        "sampler, teachers": "give the sampler and the teachers pools of their own (backend.type="
        "vllm), or lower backend.batch_size",
    }
    more = "raise student.parallel.tensor_model_parallel_size or pipeline_model_parallel_size"
    return remedies.get(largest, more)


def taking_turns(config: RunConfig, plan: Plan, shares: tuple[Share, ...]) -> list[str]:
    """A sentence for every shared pool whose members have no room beside each other."""
    memory = config.cluster.device_memory_gb
    if memory is None:
        return []
    by_owner = {(share.owner, n): share.total for share in shares for n in share.numbers}
    said = []
    for pool in (pool for pool in plan.pools if pool.shared):
        sums: dict[Slot, int] = dict.fromkeys(pool.slots, 0)
        for member in pool.members:
            for slot in member.slots:
                sums[slot] += by_owner.get((member.owner, member.number), 0)
        most = max(sums.values())
        if most > memory * GB and pool.device == plan.pools[0].device:
            said.append(
                f"pools.{pool.name}.shared: the members of one device would need {most / GB:.1f} "
                f"GB together, and it has {memory:g}: each must leave it before the next has its "
                "turn (memory counts them one at a time)"
            )
    return said
