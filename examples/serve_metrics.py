"""Serve the metrics of the bundled demo model while it runs, with a balancer that moves replicas and LASER.

python examples/serve_metrics.py [--port 9464] [--keep 600]

Needs `pip install 'equipoise[telemetry]'`. The model gets four spare slots a layer inside its own bytes, then reads
text whose domain changes; http://127.0.0.1:9464/metrics shows LIS, moved slots and rerouted tokens. It ends by itself:
after one pass over the text, or after serving on for --keep seconds. Let Prometheus scrape it and import
examples/grafana_dashboard.json to see it drawn.
"""

import argparse
import itertools
import time
import urllib.request

import prometheus_client
import torch

import equipoise as eq
from equipoise.demo import calibration_text, heldout_text
from equipoise.evaluation import batches, windows
from equipoise.files.text import read_texts
from equipoise.models import load_model
from equipoise.telemetry.prometheus import PrometheusCollector

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--port", type=int, default=9464, help="0: any free port")
arguments.add_argument("--keep", type=float, default=0.0, help="go on for so many seconds")
options = arguments.parse_args()

loaded = load_model("demo")
model = loaded.model


def some(path, step):
    """Every so many windows of a text file, domain by domain, as batches the model takes."""
    cut = windows(loaded.tokenizer, read_texts([path]), seq_len=128)[::step]
    return batches(cut, batch_size=4, config=model.config)


calibration, traffic = some(calibration_text(), 24), some(heldout_text(), 12)
profile = eq.profile(model, calibration)

# The plan is applied here; replicas move from when the block is entered, so calibration moves none.
balancer = eq.StreamingBalancer(model, replicas=4, profile=profile, window=512)

with eq.laser(model, calibration=calibration[:4]) as routing, balancer:
    telemetry = eq.Telemetry(model, balancer=balancer, laser=routing)
    registry = prometheus_client.CollectorRegistry()
    registry.register(PrometheusCollector({"demo": telemetry}, by_layer=True))
    server, thread = prometheus_client.start_http_server(options.port, "127.0.0.1", registry)
    address = f"http://127.0.0.1:{server.server_port}/metrics"
    print("serving", address, flush=True)

    end = time.monotonic() + options.keep
    for number, batch in enumerate(itertools.cycle(traffic)):
        if number >= len(traffic) and time.monotonic() > end:
            break
        with torch.no_grad():
            model(**batch, use_cache=False)
    with urllib.request.urlopen(address) as answer:
        print(answer.read().decode())
    reading = telemetry.read()

server.shutdown()
thread.join()
print({key: value for key, value in reading.items() if key != "layers"})
