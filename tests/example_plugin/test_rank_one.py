from dlrm_xla.testing import BagContract


class TestRankOne(BagContract):
    plugin = "rank_one:rank=6"
