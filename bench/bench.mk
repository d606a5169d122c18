.PHONY: bench
bench: $(VENV)/train build/bundles/dog-breeds/manifest.json ## how fast, against what; QUICK=1 five minutes; DATA=folder of photographs, ARGS=...
	@$(PY) -m bench $(if $(QUICK),--quick) $(if $(DATA),--data "$(DATA)") $(ARGS)

.PHONY: bench-gpu
bench-gpu: $(VENV)/train build/bundles/dog-breeds/manifest.json ## what a GPU gives, by itself and as a whole; ARGS=...
	@PYTHONPATH=model-server:model-server/worker $(PY) -m bench.gpu $(ARGS)
