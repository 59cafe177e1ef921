"""Many shards on many workers: shards x encoder -> feature set, and new shards of a kept list.

sharding    `embed_shards`: one idempotent function for a shard, and the loop around it
setstate    which shards are done, changed, failed or gone
launch      worker processes on this machine
on_ray      workers on a Ray cluster
resharding  `reshard`: kept list -> new tars
"""
