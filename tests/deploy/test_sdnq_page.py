"""The page of a folder for sdnq, which needs no such package."""

from ptq_exp.deploy.sdnq_page import page


def test_the_page_names_components_that_a_pipeline_does_without():
    about = {
        "model": "m", "dtype": "float16", "component": "transformer", "class": "C", "absent": ["text_encoder_3"],
        "plain": {}, "distance": {"a": 1e-8, "b": 0.0}, "types": {"int4": 2}, "left_out": [],
    }
    made = page(about)
    assert 'network = sdnq.load_sdnq_model("FOLDER/transformer", dtype=torch.float16)' in made
    assert '"FOLDER", transformer=network, torch_dtype=torch.float16, text_encoder_3=None\n' in made
    assert "at most 1e-08 (relative, in\n`a`)" in made
