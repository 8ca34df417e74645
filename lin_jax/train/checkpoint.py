"""Checkpoints: model, optimizer, data position and settings, saved while training goes on.

A checkpoint is a directory `workdir/checkpoints/STEP` with four items: `model` (trained parameters and constants),
`training` (step and optimizer), `data` (the iterator's position) and `meta` (settings, and a checksum of every array,
since a changed byte inside an array is read back without complaint). Frozen parameters stay where they came from, in
`finetune.checkpoint`; `meta` has their checksums.
"""

import dataclasses
import gc
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as policies

from lin_jax.config import CheckpointConfig, Config, ConfigError, MeshConfig, require
from lin_jax.data.tokenizers import Tokenizer, restore_tokenizer
from lin_jax.layers.lora import ADAPTER, merge_lora
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.models.medusa import HEADS
from lin_jax.overrides import config_from_dict, config_to_dict
from lin_jax.train.sharding import default_partition, make_mesh, replicated
from lin_jax.train.state import Structure, TrainState, initial_state
from lin_jax.train.trainable import NEW, structure_of

Report = Callable[[str], None]

# Where a run keeps the tokenizer's files as they came from Hugging Face, inside of its own tokenizer's directory.
KEPT_TOKENIZER = "hugging_face"

# Bytes of a file that `save_model` writes at a time.
CHUNK_BYTES = 1 << 26

# Settings that a resumed run may change: they do not alter what is learned from what, only how it is computed,
# watched and kept. `train.steps` may grow (the schedule is then that of the new length).
FREE_SETTINGS = (
    "workdir",
    "profile",
    "show_sharding",
    "plan",
    "mesh",
    "checkpoint",
    "data.tfds_directory",
    "data.cache_directory",
    "model.dtype",
    "model.remat",
    "model.attention.implementation",
    "finetune.medusa.tree_nodes",
    "finetune.checkpoint",  # It may be moved; what is frozen must have the same checksums.
    "train.steps",
    "train.microbatches",
    "train.loss_chunk",
    "train.log_every",
    "train.evaluate_every",
    "train.evaluate_batches",
    "train.max_skipped",
)


# Settings of a model that may differ from those of the model it starts from; the rest says what its parameters are.
_FREE_OF_BASE = ("attention", "dtype", "remat", "rope", "positions", "padding", "score_scale")


def checkpoints_directory(workdir: str) -> epath.Path:
    """Where a run keeps its checkpoints."""
    return epath.Path(workdir).absolute() / "checkpoints"


def tokenizer_directory(workdir: str) -> epath.Path:
    """Where a run keeps its tokenizer."""
    return epath.Path(workdir).absolute() / "tokenizer"


def base_tokenizer_directory(config: Config) -> epath.Path:
    """Where the tokenizer of `finetune.checkpoint` is."""
    return tokenizer_directory(_workdir_and_step(config.finetune.checkpoint)[0])


def keep_tokenizer_files(config: Config) -> None:
    """Copy the files of the base model's tokenizer as they came from Hugging Face, chat template included."""
    kept = base_tokenizer_directory(config) / KEPT_TOKENIZER
    if config.data.tokenizer == "checkpoint" and kept.is_dir():
        target = tokenizer_directory(config.workdir) / KEPT_TOKENIZER
        target.mkdir(parents=True, exist_ok=True)
        for file in kept.iterdir():
            file.copy(target / file.name, overwrite=True)


def has_checkpoint(config: Config) -> bool:
    """Whether there is a run to go on with.

    Raises:
        ConfigError: there is one, but it was made with other settings.
    """
    with _reader(checkpoints_directory(config.workdir)) as manager:
        for step in _steps(manager):
            try:
                meta = _read_meta(manager, step)
            except Exception:  # `restore` reports the damage.
                continue
            _require_same_settings(meta["config"], config)
            return True
        return bool(_steps(manager))


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found: a state to go on from, or None, and the steps that could not be read."""

    state: TrainState | None
    unreadable: tuple[int, ...] = ()


def restore(config: Config, abstract: TrainState, frozen: Any, iterator: Any, report: Report) -> Restored:
    """The newest checkpoint that can be read, on the devices that `abstract` names; nothing is written.

    Args:
        config: the settings of the run that wants to go on.
        abstract: shapes, types and shardings of the state; the mesh may differ from the one that saved it.
        frozen: the parameters that do not train, which checkpoints do not hold.
        iterator: the data iterator, which is set to its position.
        report: is told of checkpoints that cannot be read.

    Raises:
        ConfigError: the checkpoint is one of other settings or of other frozen parameters, or there are some but none
            can be read.
    """
    directory = checkpoints_directory(config.workdir)
    unreadable: list[int] = []
    problem = ""
    with _reader(directory) as manager:
        for step in _steps(manager):
            try:
                meta = _read_meta(manager, step)
                _require_same_settings(meta["config"], config)
                _require_same_frozen(frozen, meta, config)
                state = _restore_state(manager, step, meta, abstract, iterator)
                return Restored(dataclasses.replace(state, frozen=frozen), tuple(unreadable))
            except ConfigError:
                raise
            except Exception as error:  # Damage shows as nearly any type of error.
                problem = _first_line(error)
                unreadable.append(step)
                report(f"checkpoint {step} in {directory} cannot be read ({problem}); trying the one before it")
    require(
        not unreadable,
        f"none of the checkpoints {unreadable} in {directory} can be read ({problem}); choose another --config.workdir",
    )
    return Restored(None)


def _restore_state(manager: Any, step: int, meta: Mapping, abstract: TrainState, iterator: Any) -> TrainState:
    model, training = _items(abstract)
    found = manager.restore(
        step,
        args=ocp.args.Composite(
            model=ocp.args.StandardRestore(model),
            training=ocp.args.StandardRestore(training),
            data=ocp.args.JsonRestore(),
        ),
    )
    _require_checksums({"model": found["model"], "training": found["training"]}, meta)
    iterator.set_state(found["data"])
    return TrainState(**found["model"], **found["training"], frozen={})


class Checkpoints:
    """Saves a run's state in the background, and survives a disk that is full."""

    def __init__(self, config: Config, restored: Restored, frozen: Any, report: Report):
        self._config, self._report = config, report
        self._frozen_checksums = _checksums(frozen)
        self._directory = checkpoints_directory(config.workdir)
        self._set_aside(restored.unreadable)
        self._manager = _writer(self._directory, config.checkpoint)
        self._saved = self._asked = self._manager.latest_step()
        self._running: int | None = None

    def save(self, step: int, state: TrainState, iterator: Any, validation_loss: float | None) -> None:
        """Start to save `state`, unless this step is saved; what fails is reported, not raised."""
        if step == self._asked:
            return
        self.wait()
        self._asked = step
        try:
            self._start(step, state, iterator, validation_loss)
        except Exception as error:
            self._give_up(step, error)

    def poll(self) -> None:
        """Report a save that failed in the background."""
        self._settle(self._manager.check_for_errors)

    def wait(self) -> None:
        """Block until nothing is being saved any more."""
        self._settle(self._manager.wait_until_finished)

    def close(self) -> None:
        """Finish saving and stop the background threads."""
        self.wait()
        self._manager.close()

    @property
    def complete(self) -> bool:
        """Whether the last `save` is known to have worked; call `wait` first."""
        return self._saved == self._asked

    def _start(self, step: int, state: TrainState, iterator: Any, validation_loss: float | None) -> None:
        model, training = _items(state)
        checksums = {name: _checksums(item) for name, item in (("model", model), ("training", training))}
        checksums["frozen"] = self._frozen_checksums
        self._running = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                training=ocp.args.StandardSave(training),
                data=ocp.args.JsonSave(iterator.get_state()),
                meta=ocp.args.JsonSave({"config": config_to_dict(self._config), "checksums": checksums}),
            ),
            metrics=_metrics(validation_loss),
        )

    def _settle(self, action: Callable[[], Any]) -> None:
        if self._running is None:
            return
        try:
            action()
        except Exception as error:
            self._give_up(self._running, error)
            return
        if not self._manager.is_saving_in_progress():
            self._saved, self._running = self._running, None

    def _give_up(self, step: int, error: Exception) -> None:
        """Drop a failed save with what it left on the disk; the manager would count it as done."""
        self._report(
            f"warning: checkpoint {step} could not be saved ({_first_line(error)}); training goes on, "
            f"the newest checkpoint in {self._directory} is {self._saved}"
        )
        self._running = None
        _close_quietly(self._manager)
        for left in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            left.rmtree(missing_ok=True)
        self._manager = _writer(self._directory, self._config.checkpoint)
        self._saved = self._manager.latest_step()

    def _set_aside(self, steps: tuple[int, ...]) -> None:
        """Move checkpoints that cannot be read out of the way, so that their steps can be saved again."""
        for step in steps if jax.process_index() == 0 else ():
            aside = epath.Path(self._config.workdir) / "unreadable_checkpoints"
            aside.mkdir(parents=True, exist_ok=True)
            number = len(list(aside.glob(f"{step}*")))
            (self._directory / str(step)).rename(aside / (f"{step}_{number}" if number else str(step)))


def save_model(workdir: str, parameters: Any, config: Config, tokenizer: Tokenizer) -> None:
    """Writes a model that `load_model` reads, as step 0 of a run that has not been trained.

    Takes little memory beside the parameters: they are written in chunks, not gathered first (no OCDBT).

    Args:
        workdir: a directory without checkpoints.
        parameters: nested dictionaries of arrays, which keep their types; the model has no constants.
        config: the settings, the model's among them.
        tokenizer: the one whose tokens the model knows.
    """
    item = {"parameters": parameters, "constants": {}}
    meta = {"config": config_to_dict(config), "checksums": {"model": _checksums(item)}}
    options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
    handlers = {"model": ocp.StandardCheckpointHandler(use_ocdbt=False), "meta": ocp.JsonCheckpointHandler()}
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), item)
    directory = checkpoints_directory(workdir)
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
    workdir, step = _workdir_and_step(path)
    with _reader(checkpoints_directory(workdir)) as manager:
        steps = [step] if step is not None else _steps(manager)
        require(bool(steps), f"there is no checkpoint in {path}")
        problem = ""
        for candidate in steps:
            try:
                config, model = _load_step(manager, candidate, mesh)
            except ConfigError:
                raise
            except Exception as error:  # Damage shows as nearly any type of error.
                problem = _first_line(error)
                continue
            return model, restore_tokenizer(tokenizer_directory(workdir)), config
    raise ConfigError(f"no checkpoint of {path} can be read ({problem})")


def _load_step(manager: Any, step: int, mesh: Mesh) -> tuple[Config, nnx.Module]:
    meta = _read_meta(manager, step)
    config = config_from_dict(meta["config"])
    structure = structure_of(config)
    shapes = jax.eval_shape(structure.initialise, jnp.uint32(0))
    partition = default_partition(mesh)
    shardings = (structure.parameter_shardings(partition), jax.tree.map(lambda _: replicated(partition), shapes[1]))
    abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
    wanted = {"parameters": structure.split(abstract[0])[0], "constants": abstract[1]}
    item = _as_saved(wanted, manager.directory / str(step) / "model")
    found = _restore_one_by_one(manager, step, item)
    _require_checksums({"model": found}, meta)
    frozen = _load_frozen(config, structure, mesh)
    _require_same_frozen(frozen, meta, config)
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
    """The parameters of `config.finetune.checkpoint`, adapters merged, by path joined by dots.

    Parameters of linearized attention and of Medusa heads may be missing or left over; those that are left over are
    left out.

    Raises:
        ConfigError: it cannot be read, or is of another model than `config.model`.
    """
    path = config.finetune.checkpoint
    check_base(path)
    model, _, base = load_model(path, mesh)
    _require_same_model(base, config)
    merge_lora(model)
    found, wanted = parameters_by_path(model), parameters_by_path(structure.abstract_parameters)
    missing = [name for name in wanted if name not in found and not _is_new(name)]
    unused = [name for name in found if name not in wanted and not _is_new(name)]
    require(not missing, f"finetune.checkpoint: {path} has no {', '.join(missing[:3])}")
    require(not unused, f"finetune.checkpoint: the model has no place for {', '.join(unused[:3])} of {path}")
    used = {name: array for name, array in found.items() if name in wanted}
    for name, array in used.items():
        shape = wanted[name].shape
        require(array.shape == shape, f"finetune.checkpoint: {name} is {array.shape} in {path}, but here {shape}")
    return used


def check_base(path: str) -> None:
    """Raise `ConfigError` where there is no run at `path`, a value of `finetune.checkpoint`."""
    directory = epath.Path(path)
    require(directory.exists(), f"finetune.checkpoint: {path} does not exist")
    plain = (directory / "config.json").exists() and not (directory / "checkpoints").exists()
    convert = f"python convert_weights.py --input {path} --output RUN"
    require(not plain, f"finetune.checkpoint: {path} is not a run of lin_jax; convert it first: {convert}")


def _is_new(name: str) -> bool:
    """Whether a parameter is one of linearized attention, of an adapter or of Medusa heads."""
    parts = name.split(".")
    return parts[-1] in NEW or ADAPTER in parts or parts[0] == HEADS


def _require_same_model(base: Config, config: Config) -> None:
    """Raise `ConfigError` naming the first setting of the model that another attention does not explain."""
    old, new = config_to_dict(base.model), config_to_dict(config.model)
    for name, value in new.items():
        require(
            name in _FREE_OF_BASE or old.get(name) == value,
            f"config.model.{name} is {value}, but the model in finetune.checkpoint={config.finetune.checkpoint} has "
            f"{old.get(name)}",
        )
    if config.finetune.objective == "medusa":
        _require_same_attention(old["attention"], new["attention"], config.finetune.checkpoint)


def _require_same_attention(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> None:
    """Raise `ConfigError` where heads would learn from features that the model does not have."""
    # Softmax attention has no settings of its own.
    for name, value in ({"kind": "softmax"} if new["kind"] == "softmax" else new).items():
        require(
            name == "implementation" or old.get(name) == value,
            f"config.model.attention.{name} is {value}, but the model in finetune.checkpoint={path} has "
            f"{old.get(name)}, which objective=medusa must not change",
        )


def _require_same_frozen(frozen: Any, meta: Mapping[str, Any], config: Config) -> None:
    saved = meta["checksums"].get("frozen", {})
    require(
        _checksums(frozen) == saved,
        f"the parameters in finetune.checkpoint={config.finetune.checkpoint} are not those that the run in "
        f"{config.workdir} was started from: put them back, or choose another --config.workdir",
    )


def _as_saved(item: Any, directory: epath.Path) -> Any:
    """`item`, arrays that are wanted, with the types that a checkpoint holds them in."""
    saved = ocp.StandardCheckpointHandler().metadata(directory).tree
    types = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree.leaves_with_path(saved)}
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


def _workdir_and_step(path: str) -> tuple[str, int | None]:
    place = epath.Path(path)
    if place.parent.name == "checkpoints" and place.name.isdigit():
        return str(place.parent.parent), int(place.name)
    return path, None


def _read_meta(manager: Any, step: int) -> Mapping[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {"parameters": state.parameters, "constants": state.constants}
    return model, {"step": state.step, "optimizer": state.optimizer}


def _reader(directory: epath.Path) -> Any:
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True, create=False))


def _writer(directory: epath.Path, config: CheckpointConfig) -> Any:
    keep: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_best:
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["validation_loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        keep.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(directory, options=options)


def _steps(manager: Any) -> list[int]:
    """Newest first."""
    return sorted(manager.all_steps(), reverse=True)


def _close_quietly(manager: Any) -> None:
    """Close a manager whose error is already known; it raises the same one again."""
    try:
        manager.close()
    except Exception:
        return


def _metrics(validation_loss: float | None) -> dict[str, float] | None:
    finite = validation_loss is not None and math.isfinite(validation_loss)
    return {"validation_loss": float(validation_loss)} if finite else None  # type: ignore[arg-type]


@jax.jit
def _sum_on_device(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize])
    return jnp.sum(array.astype(jnp.uint32), dtype=jnp.uint32)


def _sum_on_host(array: jax.Array) -> int:
    """As on a device; XLA's CPU programs would take twice the array's memory for it."""
    shards = (np.asarray(shard.data) for shard in array.addressable_shards if shard.replica_id == 0)
    if jnp.issubdtype(array.dtype, jnp.floating):
        shards = (shard.view(_UNSIGNED[array.dtype.itemsize]) for shard in shards)
    return sum(int(np.sum(shard, dtype=np.uint32)) for shard in shards) % 2**32


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _sum_of_bits(array: jax.Array) -> int:
    """The sum of an array's bits as integers, modulo 2**32: the same however the array is cut."""
    on_host = array.is_fully_addressable and jax.default_backend() == "cpu"
    return _sum_on_host(array) if on_host else int(_sum_on_device(array))


def _checksums(item: Any) -> dict[str, int]:
    leaves = jax.tree.leaves_with_path(item)
    return {jax.tree_util.keystr(path, simple=True, separator="."): _sum_of_bits(leaf) for path, leaf in leaves}


def _require_checksums(items: Mapping[str, Any], meta: Mapping) -> None:
    for name, item in items.items():
        for key, value in _checksums(item).items():
            if value != meta["checksums"][name][key]:
                raise ValueError(f"{name}.{key} does not have the checksum it was saved with")


def _require_same_settings(saved: Mapping[str, Any], config: Config) -> None:
    """Raise `ConfigError` naming the first setting that a resumed run must not change."""
    # Settings that are newer than the checkpoint had their defaults then.
    old_values = _flatten(config_to_dict(config_from_dict(dict(saved))))
    for name, value in _flatten(config_to_dict(config)).items():
        old = old_values.get(name)
        free = any(name == setting or name.startswith(setting + ".") for setting in FREE_SETTINGS)
        require(
            free or old == value,
            f"config.{name} is {value}, but the checkpoints in {checkpoints_directory(config.workdir)} were made with "
            f"{old}: set it back, or choose another --config.workdir",
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
