"""Models that are kept in a run's directory: written without training, and read to be used or trained further."""

import gc
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from lin_jax.data.tokenizers import Tokenizer, restore_tokenizer
from lin_jax.experiment import Config, config_from_dict
from lin_jax.layers.lora import merge_lora
from lin_jax.layers.parameter import constants_by_path, parameters_by_path
from lin_jax.models.structure import Structure
from lin_jax.ops.checksums import checksums, require_checksums
from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.settings.dictionaries import section_to_dict
from lin_jax.settings.mesh import MeshConfig
from lin_jax.tasks.base import Task
from lin_jax.tasks.registry import task_of
from lin_jax.train.base import check_base, is_foreign, load_foreign, require_same_frozen, require_same_model
from lin_jax.train.manifest import require_undamaged, saving_options
from lin_jax.train.sharding import default_partition, make_mesh
from lin_jax.train.state import initial_state
from lin_jax.train.trainable import new_parameters, structure_of
from lin_jax.train.workdir import (
    checkpoints_directory,
    read_meta,
    reader,
    saved_steps,
    tokenizer_directory,
    workdir_and_step,
)

# Bytes of a file that `save_model` writes at a time.
CHUNK_BYTES = 1 << 26


def save_model(
    workdir: str, parameters: Any, config: Config, tokenizer: Tokenizer, constants: Mapping[str, Any] | None = None
) -> None:
    """Writes a model that `load_model` reads, as step 0 of a run that has not been trained.

    Takes little memory beside the parameters: they are written in chunks, not gathered first (no OCDBT).

    Args:
        workdir: a directory without checkpoints.
        parameters: nested dictionaries of arrays, which keep their types.
        config: the settings, the model's among them.
        tokenizer: the one whose tokens the model knows.
        constants: likewise nested, of a model that has some.
    """
    item = {"parameters": parameters, "constants": dict(constants or {})}
    meta = {"config": section_to_dict(config), "checksums": {"model": checksums(item)}}
    directory = checkpoints_directory(workdir)
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True, async_options=saving_options(directory, lambda: 0)
    )
    handlers = {"model": ocp.StandardCheckpointHandler(use_ocdbt=False), "meta": ocp.JsonCheckpointHandler()}
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), item)
    with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
        model = ocp.args.StandardSave(item, save_args=chunked)
        manager.save(0, args=ocp.args.Composite(model=model, meta=ocp.args.JsonSave(meta)))
        manager.wait_until_finished()
    tokenizer.save(tokenizer_directory(workdir))


def load_model(path: str, mesh: Mesh | None = None) -> tuple[nnx.Module, Tokenizer, Config]:
    """The model, tokenizer and settings of a trained run; its parameters have the types that were saved.

    Args:
        path: a run's workdir (its newest checkpoint that can be read is taken) or `workdir/checkpoints/STEP`.
        mesh: the devices; all of this machine's, each with a whole copy, by default.

    Raises:
        ConfigError: there is no checkpoint, or it cannot be read.
    """
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    workdir, step = workdir_and_step(path)
    with reader(checkpoints_directory(workdir)) as manager:
        steps = [step] if step is not None else saved_steps(manager)
        require(bool(steps), f"there is no checkpoint in {path}")
        problem = ""
        for candidate in steps:
            try:
                config, model = _load_step(manager, candidate, mesh)
            except ConfigError:
                raise
            except Exception as error:  # Damage shows as nearly any type of error.
                problem = first_line(error)
                continue
            return model, restore_tokenizer(tokenizer_directory(workdir)), config
    raise ConfigError(f"no checkpoint of {path} can be read ({problem})")


def _load_step(manager: Any, step: int, mesh: Mesh) -> tuple[Config, nnx.Module]:
    meta = read_meta(manager, step)
    require_undamaged(manager.directory / str(step), ("model",))
    config = config_from_dict(meta["config"])
    structure = structure_of(config, teachers=False)
    shapes = jax.eval_shape(structure.initialise, jnp.uint32(0))
    partition = default_partition(mesh)
    shardings = (structure.parameter_shardings(partition), structure.constant_shardings(partition))
    abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
    wanted = {"parameters": structure.split(abstract[0])[0], "constants": abstract[1]}
    item = _as_saved(wanted, manager.directory / str(step) / "model", leaving=task_of(config).teachers)
    found = _restore_one_by_one(manager, step, item)
    require_checksums({"model": found}, meta)
    frozen = _load_frozen(config, structure, mesh)
    require_same_frozen(frozen, meta, config)
    return config, structure.merge(structure.join(found["parameters"], frozen), found["constants"])


def _load_frozen(config: Config, structure: Structure, mesh: Mesh) -> Any:
    """The parameters that a run does not train, as it held them."""
    if not structure.has_frozen:
        return {}
    base = load_base(config, structure, mesh)
    shardings = structure.split(structure.parameter_shardings(default_partition(mesh)))[1]
    start = jax.jit(
        lambda seed, known: initial_state(structure, optax.identity(), seed, known).frozen, out_shardings=shardings
    )
    return start(jnp.uint32(config.train.seed), base)


def load_base(config: Config, structure: Structure, mesh: Mesh) -> dict[str, jax.Array]:
    """Return the parameters, adapters merged, and constants of `config.finetune.checkpoint`, by path joined by dots.

    Parameters of linearized attention and what tasks add to models may be missing or left over, and heads that the
    model `leaves` be left over; what is left over is left out.

    Raises:
        ConfigError: it cannot be read, or is of another model than `config.model`.
    """
    path = config.finetune.checkpoint
    check_base(path)
    model, base = load_foreign(path, mesh) if is_foreign(path) else load_model(path, mesh)[::2]
    require_same_model(base, config)
    merge_lora(model)
    task = task_of(config)
    for name in task.starts_fresh:
        if hasattr(model, name):
            delattr(model, name)
    found, wanted = parameters_by_path(model), parameters_by_path(structure.abstract_parameters)
    new = new_parameters(task, structure.abstract_parameters) | new_parameters(task_of(base), model)
    added = {".".join(path) for path in new}
    missing = sorted(wanted.keys() - found.keys() - added)
    left = {name for name in found if name.partition(".")[0] in model.leaves}
    unused = sorted(found.keys() - wanted.keys() - added - left)
    require(not missing, f"finetune.checkpoint: {path} has no {', '.join(missing[:3])}")
    require(not unused, f"finetune.checkpoint: the model has no place for {', '.join(unused[:3])} of {path}")
    wanted |= constants_by_path(structure.abstract_constants)
    used = {name: array for name, array in (found | constants_by_path(model)).items() if name in wanted}
    for name, array in used.items():
        shape = wanted[name].shape
        require(array.shape == shape, f"finetune.checkpoint: {name} is {array.shape} in {path}, but here {shape}")
    return used


def load_teachers(task: Task, mesh: Mesh) -> dict[str, jax.Array]:
    """Return the parameters and constants of a task's teachers, adapters merged, by path joined by dots."""
    found: dict[str, jax.Array] = {}
    for name, path in task.teachers.items():
        model = load_model(path, mesh)[0]
        merge_lora(model)
        arrays = parameters_by_path(model) | constants_by_path(model)
        found |= {f"{name}.{key}": array for key, array in arrays.items()}
    return found


def _as_saved(item: Any, directory: epath.Path, leaving: Collection[str]) -> Any:
    """Return `item`, arrays that are wanted, with the types that a checkpoint holds them in.

    It may hold others, under names `leaving` of parts of the model.
    """
    saved = ocp.StandardCheckpointHandler().metadata(directory).tree
    leaves = [(path, leaf) for path, leaf in jax.tree.leaves_with_path(saved) if path[1].key not in leaving]
    types = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in leaves}
    wanted = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(item)}
    if types.keys() != wanted:
        raise ValueError(f"{directory} holds other arrays than the model: {sorted(types.keys() ^ wanted)[:3]}")
    typed = lambda path, s: jax.ShapeDtypeStruct(s.shape, types[jax.tree_util.keystr(path)], sharding=s.sharding)  # noqa: E731
    return jax.tree_util.tree_map_with_path(typed, item)


def _restore_one_by_one(manager: Any, step: int, item: Any) -> Any:
    """The arrays of a model, the largest first: reading one takes its size once more, but less than what is to come."""
    leaves, structure = jax.tree.flatten_with_path(item)
    arrays: list[Any] = [None] * len(leaves)
    for number in sorted(range(len(leaves)), key=lambda number: -leaves[number][1].size):
        arrays[number] = _restore_array(manager, step, *leaves[number])
        if arrays[number].nbytes > CHUNK_BYTES:
            gc.collect()  # The library leaves what it read in a cycle of references.
    return jax.tree.unflatten(structure, arrays)


def _restore_array(manager: Any, step: int, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    item: Any = leaf
    for key in reversed(path):
        item = {key.key: item}
    how = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
    return jax.tree.leaves(manager.restore(step, args=ocp.args.Composite(model=args))["model"])[0]
