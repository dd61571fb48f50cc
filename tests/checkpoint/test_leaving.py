"""Two real processes, of which one fails by itself while a checkpoint is written: it leaves without the other."""

from tests.checkpoint.test_processes import together

LEAVE = """
import sys, time, jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax._src import distributed
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from maxlm.checkpoint.bucket import open_checkpointer, open_reader
from maxlm.cluster import meet
from maxlm.config import CheckpointConfig
from maxlm.errors import UserError

me, client = jax.process_index(), distributed.global_state.client
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
x = jax.make_array_from_callback((4096,), sharding, lambda i: np.arange(4096, dtype=np.float32)[i])
for number, place in enumerate(sys.argv[1].split(",")):
    victim = number % 2
    try:
        with open_checkpointer(place, CheckpointConfig(), log=print) as c:
            assert c.save(1, {"x": x}, metadata={}).started
            if me == victim:
                raise UserError("the store is damaged")
            client.blocking_key_value_get(f"gone {number}", 90_000)  # as in the collective of a step
            raise UserError("the other one is gone")
    except UserError as error:
        if me == victim:
            assert str(error) == "the store is damaged"
            client.key_value_set(f"gone {number}", "yes")
    meet("both have left")
    assert open_reader(place).steps() == [1], place  # what was under way is whole
print("AGREED", flush=True)
"""


def test_a_process_that_fails_by_itself_waits_for_nobody_and_the_save_is_whole(tmp_path, bucket):
    places = [tmp_path / "0", tmp_path / "1", f"{bucket}/0", f"{bucket}/1"]
    together(LEAVE, ",".join(map(str, places)))
