"""The ways in which several processes train one PEFT model: copied, or sharded layer by layer."""

from torch.nn.parallel import DistributedDataParallel


def data_parallel(model):
    return DistributedDataParallel(model, find_unused_parameters=False)


def fully_sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)
