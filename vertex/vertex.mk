# Vertex AI, by the settings of one file.
VERTEX_ENV ?= vertex/vertex.env
VERTEX = @$(VENV)/vertex/bin/python -m vertex
VERTEX_FLAGS = --env "$(VERTEX_ENV)" $(FLAGS)
# Training's own options, as of `make train`.
VERTEX_RUN = $(VERTEX_FLAGS) --image "$(or $(IMAGE),kennel/training:$(VERSION))" --docker "$(DOCKER)" \
  --out "$(or $(OUT),build/bundles/mine)" $(if $(CSV),--csv "$(CSV)") $(if $(DRY),--dry-run) $(if $(PRUNE),--prune) \
  $(if $(JOB),--job "$(JOB)")
VERTEX_TRAINING = -- $(if $(QUICK),--quick) $(if $(REQUIRE),--require $(foreach r,$(REQUIRE),'$(r)')) $(ARGS)

.PHONY: vertex-train
vertex-train: $(VENV)/vertex/done ## as train, on Vertex AI by vertex/vertex.env; DRY=1 prints the job, FLAGS='--strategy spot'
	$(VERTEX) train $(VERTEX_RUN) $(if $(DATA),"$(DATA)") $(VERTEX_TRAINING)

.PHONY: vertex-tune
vertex-tune: $(VENV)/vertex/done ## the best of many: RANGES='lr=1e-4:2e-3:log augment=light,strong' DATA=... FLAGS='--trials 12'
	$(VERTEX) tune $(VERTEX_RUN) $(if $(DATA),"$(DATA)") $(if $(RANGES),--range $(RANGES)) $(VERTEX_TRAINING)

.PHONY: vertex-status
vertex-status: $(VENV)/vertex/done ## the last jobs and endpoints; JOB=number for one and its log
	$(VERTEX) status $(VERTEX_FLAGS) $(if $(JOB),--job "$(JOB)")

.PHONY: vertex-deploy
vertex-deploy: $(VENV)/vertex/done ## MODEL=bundle behind an endpoint of Vertex AI, without a cluster; DRY=1 prints it
	$(VERTEX) deploy $(VERTEX_FLAGS) --image "$(or $(IMAGE),kennel/endpoint:$(VERSION))" --docker "$(DOCKER)" \
	  $(if $(DRY),--dry-run) "$(if $(filter gs://%,$(MODEL)),$(MODEL),$(BUNDLE))"

.PHONY: vertex-pipeline
vertex-pipeline: $(VENV)/vertex/done ## DATA to what the cluster serves next: NAME=clothes FAMILIES='lite0 lite1' REQUIRE=...; HERE=1 in Docker here, DEPLOY=1
	@$(VENV)/vertex/bin/python -m vertex.pipeline $(VERTEX_FLAGS) --gke-env "$(GKE_ENV)" --docker "$(DOCKER)" \
	  --image kennel/training:$(VERSION) --model-server-image kennel/model-server:$(VERSION) \
	  --serving-image kennel/endpoint:$(VERSION) $(if $(NAME),--name "$(NAME)") $(if $(JOB),--job "$(JOB)") \
	  $(foreach f,$(FAMILIES),--family $(f)) $(if $(REQUIRE),--require $(foreach r,$(REQUIRE),'$(r)')) \
	  $(if $(HERE),--here) $(if $(DRY),--dry-run) $(if $(PRUNE),--prune) $(if $(DATA),"$(DATA)") -- $(if $(QUICK),--quick) $(ARGS)
	$(if $(DEPLOY),@$(MAKE) gke-deploy)
