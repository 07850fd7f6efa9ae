"""The largest columns of a vocabulary, on one shard."""

import torch

from mopd.losses.vocab import VocabShard


def test_more_than_there_are_gives_each_token_once():
    values = torch.rand(3, 23, generator=torch.Generator().manual_seed(0))
    shard = VocabShard(start=0, size=32, vocab_size=23).without_padding()
    top, ids = shard.top_k(values, 30)
    assert top.shape == (3, 23)
    assert (ids.sort(dim=1).values == torch.arange(23)).all()
    assert torch.equal(top, values.gather(1, ids))
    assert (top[:, :-1] >= top[:, 1:]).all()
