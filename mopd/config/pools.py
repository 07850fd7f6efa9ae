"""Who sits where: in the student's processes, at URLs, or in a pool of devices of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mopd.config.backends import RolloutBackendSection, TeacherBackendSection
from mopd.config.check_servers import is_started
from mopd.config.keys import NAME
from mopd.config.schema import RunConfig

STUDENT, ROLLOUT = "student", "rollout"  # names of pools, and owners


def teacher_owner(name: str) -> str:
    """The owner's name of a teacher, as in teachers.math."""
    return f"teachers.{name}"


def pools_of(config: RunConfig) -> dict[str, str]:
    """The pool of every owner that has engines of its own: rollout, teachers.math.

    Left out are a sampler and teachers inside the student's processes, and those at URLs.
    """
    found: dict[str, str] = {}
    if _is_service(config, config.rollout.backend, pool=config.rollout.pool):
        found[ROLLOUT] = config.rollout.pool or ROLLOUT
    for name, teacher in config.teachers.items():
        if teacher.weight > 0 and _is_service(config, teacher.backend, pool=teacher.pool):
            found[teacher_owner(name)] = teacher.pool or name
    return found


def shared_pool_of(config: RunConfig, owner: str) -> str | None:
    """The pool on whose devices this owner's engines take turns; None: they have their own."""
    pool = pools_of(config).get(owner)
    section = None if pool is None else config.pools.get(pool)
    return pool if section is not None and section.shared else None


def student_takes_turns(config: RunConfig) -> bool:
    """Whether engines that the run starts are on the student's devices."""
    section = config.pools.get(STUDENT)
    return section is not None and section.shared and STUDENT in pools_of(config).values()


def backends_of(config: RunConfig) -> Mapping[str, TeacherBackendSection | RolloutBackendSection]:
    """The backend section of every owner, active or not."""
    teachers = {teacher_owner(name): one.backend for name, one in config.teachers.items()}
    return {ROLLOUT: config.rollout.backend, **teachers}


def _is_service(
    config: RunConfig,
    backend: TeacherBackendSection | RolloutBackendSection,
    *,
    pool: str | None,
) -> bool:
    """Whether the run starts engines for it: servers, and in Ray mode transformers in an actor."""
    return is_started(backend) or _is_actor(config, backend, pool=pool)


def _is_actor(
    config: RunConfig,
    backend: TeacherBackendSection | RolloutBackendSection,
    *,
    pool: str | None,
) -> bool:
    if config.launcher != "ray" or backend.type != "hf" or pool == STUDENT:
        return False
    return isinstance(backend, TeacherBackendSection) or pool is not None


def is_actor(config: RunConfig, owner: str) -> bool:
    """Whether this owner's transformers are in actors of Ray, and are asked as servers are."""
    return _is_actor(config, backends_of(config)[owner], pool=_named(config)[owner])


def actor_hint(config: RunConfig, owner: str) -> str:
    """What would make an actor of transformers in the student's processes, for a message; empty
    for other types."""
    if backends_of(config)[owner].type != "hf" or is_actor(config, owner):
        return ""
    if config.launcher != "ray":
        pool = f" and {ROLLOUT}.pool" if owner == ROLLOUT else ""
        return f", or type=hf with launcher=ray{pool}"
    return f", or type=hf with {owner}.pool set to another pool than the student's"


def _named(config: RunConfig) -> dict[str, str | None]:
    """What the recipe says about every owner's pool."""
    teachers = {teacher_owner(name): one.pool for name, one in config.teachers.items()}
    return {ROLLOUT: config.rollout.pool, **teachers}


def check_pools(config: RunConfig) -> Iterator[str]:
    """One line per mistake: the key, what is wrong, the remedy."""
    used = {STUDENT, *pools_of(config).values()}
    for name in sorted({*config.pools, *used}):
        if not NAME.fullmatch(name):
            yield f"pools.{name}: a name has letters, digits, `-` and `_` only; rename it"
    for name in config.pools:
        if name not in used:
            yield (
                f"pools.{name}: nobody is in it; name it in rollout.pool or teachers.<name>.pool "
                f"(pools here: {', '.join(sorted(used))}), or leave it out"
            )
    found = pools_of(config)
    for owner, pool in _named(config).items():
        if pool is None or pool == STUDENT or owner in found:
            continue
        backend = backends_of(config)[owner]
        if backend.urls:
            yield f"{owner}.pool: {owner}.backend.urls are servers elsewhere; leave one of them out"
        elif backend.type == "hf":
            yield (
                f"{owner}.pool: under torchrun backend.type=hf is in the student's processes; set "
                "launcher=ray, or leave pool out"
            )
        elif owner == ROLLOUT or config.teachers[owner.partition(".")[2]].weight > 0:
            yield (
                f"{owner}.pool: backend.type={backend.type} is in the student's processes; leave "
                "pool out"
            )
    yield from _shared_with_student(config, found)
    yield from _broadcast_in_turns(config)


def _shared_with_student(config: RunConfig, found: Mapping[str, str]) -> Iterator[str]:
    section = config.pools.get(STUDENT)
    for owner, pool in found.items():
        if pool == STUDENT and not (section is not None and section.shared):
            yield (
                f"{owner}.pool: servers in the student's pool take turns with it; set "
                "pools.student.shared=true, or give them a pool of their own"
            )


def _broadcast_in_turns(config: RunConfig) -> Iterator[str]:
    """All engines of a sampler meet in one broadcast, and one lease lets in one at a time."""
    backend, pool = config.rollout.backend, shared_pool_of(config, ROLLOUT)
    if pool is not None and backend.weight_sync == "broadcast" and backend.server.replicas > 1:
        yield (
            f"rollout.backend.weight_sync=broadcast: needs all {backend.server.replicas} engines "
            f"at once, and those of pools.{pool} take turns; set weight_sync=files, or give the "
            "sampler a pool of its own"
        )
