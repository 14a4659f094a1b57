"""Other people's clients, unchanged: Cohere's; OpenAI's and lm-evaluation-harness's have files of their own."""

import cohere
import pytest

DOCUMENTS = ["Subject: lunch at noon", "You won a prize, click here", "The minutes of our meeting"]


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_cohere_reranks(url, engine, kind):
    client = kind(api_key="none", base_url=url)
    told = client.rerank(model="demo", query="Is this mail wanted?", documents=DOCUMENTS, top_n=2)
    (want,) = engine.rank(
        [{"query": "Is this mail wanted?", "documents": DOCUMENTS}],
        text_column="query",
        candidates_column="documents",
        top_n=2,
    )
    assert [result.index for result in told.results] == want.indices
    assert [result.relevance_score for result in told.results] == pytest.approx(want.scores, rel=1e-4)
