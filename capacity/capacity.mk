.PHONY: calibrate
calibrate: $(VENV)/train build/bundles/dog-breeds/manifest.json ## what a replica carries, as a kustomize component; MODEL=bundle DATA=photographs ARGS='--objective 300'
	@$(PY) -m capacity.calibrate --model $(MODEL) $(if $(DATA),--data "$(DATA)") $(ARGS)

.PHONY: simulate
simulate: $(VENV)/train ## both HPAs under ramps, spikes and a day of traffic, from what was calibrated; ARGS='--peak 10000'
	@$(PY) -m capacity.simulate $(ARGS)

.PHONY: capacity-check
capacity-check: $(VENV)/dev ## the simulation against the cluster of KUBECONFIG, whose ingress is KENNEL_URL
	@$(PY) -m capacity.check $(ARGS)
