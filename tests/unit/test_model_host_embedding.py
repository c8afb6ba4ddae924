"""The embedding in host RAM: the same rows, invisible to `.to`, `state_dict` and the model's device."""

import tiny_models
import torch

from fastft.model import host_embedding


def test_rows_and_what_the_model_sees_of_it() -> None:
    """Gemma 3's embedding scales its rows."""
    for kind in ("llama", "gemma3_text"):
        model = tiny_models.BUILDERS[kind]().eval()
        if kind == "gemma3_text":
            model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone())
        ids = torch.arange(12).view(2, 6)
        expected = model(input_ids=ids, use_cache=False).logits
        table = model.get_input_embeddings().weight
        hosted = host_embedding.install(model)
        assert model.get_input_embeddings() is hosted
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        assert hosted.weight is table
        assert hosted.num_weights == table.numel()
        assert not any("embed_tokens" in name for name in (*model.state_dict(), *dict(model.named_parameters())))
        model.to("meta")
        assert model.device.type == "meta"
        assert hosted.weight.device.type == "cpu"
        assert hosted(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, 1, table.shape[1])
