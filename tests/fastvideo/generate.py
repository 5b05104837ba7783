"""A script that uses FastVideo: `FOLDER OUT`. It makes videos, and saves their frames to OUT."""

from __future__ import annotations

import json
import os
import sys

from dynaflow_serving.integrations.fastvideo import cuda_stand_in

cuda_stand_in.install()  # the ranks, which import this script, need it, too

import torch  # noqa: E402

torch.set_num_threads(1)
if __name__ == "__main__":
    import numpy
    from fastvideo import VideoGenerator
    from tiny_wan import ARGUMENTS

    folder, out = sys.argv[1:]
    generator = VideoGenerator.from_pretrained(
        folder,
        num_gpus=2,
        sp_size=2,
        tp_size=1,
        use_fsdp_inference=False,
        dit_cpu_offload=False,
        dit_layerwise_offload=False,
        vae_cpu_offload=False,
        text_encoder_cpu_offload=False,
        pin_cpu_memory=False,
    )
    videos = []
    for changes in json.loads(os.environ["GENERATIONS"]):
        given = {**ARGUMENTS, "seed": 42, "save_video": False, "return_frames": True, **changes}
        made = generator.generate_video(**given)
        videos.append(numpy.asarray(made["samples"] if isinstance(made, dict) else made, dtype=numpy.float64).ravel())
    numpy.save(out, numpy.concatenate(videos))
    generator.shutdown()
