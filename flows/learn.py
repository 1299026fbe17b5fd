"""`learn-layers`: after a deployment, learn what makes the next one of a changed image quick."""

from __future__ import annotations

from prefect import flow
from prefect.logging import get_run_logger

from tasks.learning import learn_layers_of_image


@flow(name="learn-layers", flow_run_name="learn the layers of {reference}")
async def learn_layers(image_id: str, reference: str) -> dict[str, int]:
    """Let the engine compress each layer once, at low priority, and note the digests.

    From then on a deployment of an image that shares layers with this one reads only the others. Returns
    how many layers were `learnt`; safe at any time, and twice.
    """
    learnt = await learn_layers_of_image(image_id)
    get_run_logger().info("%d layers of %s learnt", learnt, reference)
    return {"learnt": learnt}
