"""The pages docs/{config,metrics,openai}.md are what the code says: `scripts/write_reference.py` writes them."""

from kvcore.config.file import load_config
from scripts.write_reference import (
    CONFIG_PAGE,
    METRICS_PAGE,
    OPENAI_PAGE,
    config_page,
    config_sections,
    metrics,
    metrics_by_process,
    metrics_page,
    openai_page,
)


def test_the_page_of_the_cluster_file_is_what_the_schema_says():
    assert CONFIG_PAGE.read_text() == config_page()


def test_the_page_of_the_metrics_is_what_their_list_says():
    assert METRICS_PAGE.read_text() == metrics_page()


def test_the_page_of_the_openai_api_is_what_its_schema_says():
    assert OPENAI_PAGE.read_text() == openai_page()


def test_every_key_of_the_schema_says_what_it_means():
    keys = [key for _, _, keys in config_sections() for key in keys]
    assert len(keys) > 80
    assert not [key.path for key in keys if not key.meaning]


def test_every_metric_is_on_the_page_of_the_process_that_fills_it():
    exposed = [metric for of_one in metrics_by_process().values() for metric in of_one]
    assert exposed == list(metrics().values())


def test_every_key_that_a_shipped_file_has_is_on_the_page(request):
    page = CONFIG_PAGE.read_text()
    config = load_config(request.config.rootpath / "configs/rdma-1p1d.yaml")
    for section in ("model", "kv", "transport", "store", "metadata_server", "router", "service"):
        for name in getattr(config, section).__struct_fields__:
            assert f"`{section}.{name}`" in page
