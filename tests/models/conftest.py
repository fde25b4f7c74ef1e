import pytest
import torch


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Return a tiny BERT of transformers and the folder it is saved in."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=300, max_position_embeddings=16, initializer_range=0.5, **sizes)).eval()
    model.save_pretrained(folder := tmp_path_factory.mktemp("bert"))
    return model, folder
