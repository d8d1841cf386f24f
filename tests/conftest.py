"""What every test shares: a fixed seed, few threads, no network, a GPU where one is promised."""

import os
import sys

# before the first import of transformers: it reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch


def pytest_configure(config):
    if os.environ.get("HYLORADA_REQUIRE_GPU") == "1" and not torch.cuda.is_available():
        raise pytest.UsageError("HYLORADA_REQUIRE_GPU=1, but torch sees no CUDA device")
    # processes of pytest-xdist share the cores
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What another test compiled would count towards this one's limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def one_thread():
    """For models and cases too small to share; processes that share the cores would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer():
    """One token a character, ids below 97; <eos> is 1, <pad> is 2, anything unknown is 0."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = "\n .,:;!?'-" + "abcdefghijklmnopqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", "<pad>", *characters])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", model_max_length=10_000
    )
