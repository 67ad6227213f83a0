//! The same checkpoint seen in another way: through overlays, along other layers, with other norms.

use std::sync::Arc;

use moe_checkpoint::{Checkpoint, StreamEdit};

use super::Model;
use crate::{
    depth::{DepthRule, LayerPath},
    error::{Error, Result},
    expert_cache::{ExpertCacheOptions, ExpertStream},
    memory::Residency,
    overlay::{self, ExpertOverlay, RoutingOverlay, StackedRouting},
    precision::Precision,
};

impl Model {
    /// Another checkpoint on the device, within the memory and in the precision of this model.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn like(&self, checkpoint: Arc<Checkpoint>) -> Result<Self> {
        Ok(Self { precision: self.precision, ..Self::new(checkpoint, &self.device, self.max_memory)? })
    }

    /// What results follow from, besides data: the fingerprint of the checkpoint, and the precision if it is not f32.
    /// Overlays and adapters are not in it.
    pub fn identity(&self) -> String {
        match self.precision {
            Precision::F32 => self.checkpoint.fingerprint(),
            other => format!("{} in {other}", self.checkpoint.fingerprint()),
        }
    }

    /// The same model whose products with weights are computed in this precision. Where the processor cannot, they stay
    /// in f32, and a line says so.
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        if !precision.is_available(&self.device) {
            tracing::warn!("products stay in f32: this processor has no {precision} products (AVX-512-BF16)");
            return self;
        }
        self.set_residency(Residency::default());
        self.precision = precision;
        self
    }

    /// The same checkpoint seen through `overlay`, with a cache of its own and without the overlays of this model.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_overlay(&self, overlay: Arc<dyn ExpertOverlay>) -> Result<Self> {
        self.with_overlays(Some(overlay), None)
    }

    /// The same checkpoint seen through overlays of its experts and of its routing, with a cache of its own and without
    /// the overlays of this model. Sweeps, generation and evaluation honor them alike.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Input`] for a routing overlay that does not fit the model: experts that do not
    /// exist, none left in a layer, gains or router weights of another size, groups of experts that do not lose as many
    /// each.
    pub fn with_overlays(
        &self,
        experts: Option<Arc<dyn ExpertOverlay>>,
        routing: Option<Arc<dyn RoutingOverlay>>,
    ) -> Result<Self> {
        let mut model = self.like(self.checkpoint.clone())?;
        if let Some(routing) = &routing {
            overlay::routing::check(&**routing, model.config(), &model.router)?;
        }
        (model.experts, model.routing) = (experts, routing);
        model.decoded_per_use = self.decoded_per_use;
        (model.path, model.depth, model.centered) = (self.path.clone(), self.depth.clone(), self.centered);
        Ok(model)
    }

    /// The same model, overlays and adapters included, with `routing` on top of what changes its routing already.
    ///
    /// # Errors
    /// As [`with_overlays`](Self::with_overlays), and [`Error::Input`] for a layer in which both have a rule, or remove
    /// experts.
    pub fn routed_by(&self, routing: Arc<dyn RoutingOverlay>) -> Result<Self> {
        let routing: Arc<dyn RoutingOverlay> = match &self.routing {
            Some(own) => Arc::new(StackedRouting::new(own.clone(), routing, self.config().layers.len())?),
            None => routing,
        };
        let model = self.with_overlays(self.experts.clone(), Some(routing))?;
        Ok(Self { adapters: self.adapters.clone(), ..model })
    }

    /// The same model, overlays and adapters included, whose tokens go through these layers. What the embeddings and
    /// the head do stays as it is.
    ///
    /// # Errors
    /// [`Error::Input`] for layers that the model does not have; [`Error::Unsupported`] where a rule decides about
    /// depth already, and where [layers belong together](moe_checkpoint::ModelConfig::inseparable).
    pub fn with_path(&self, path: LayerPath) -> Result<Self> {
        path.check(self.config().layers.len())?;
        if !path.is_whole(self.config().layers.len()) {
            self.check_separable("a path that leaves layers out, repeats them or changes their order")?;
        }
        if self.depth.is_some() {
            return Err(Error::Unsupported("a path of layers beside a rule that decides about them".into()));
        }
        let model = self.with_overlays(self.experts.clone(), self.routing.clone())?;
        Ok(Self { adapters: self.adapters.clone(), path: Arc::new(path), ..model })
    }

    /// The same model, overlays and adapters included, of which `rule` decides while it runs how often sequences go
    /// through a layer and which tokens skip its feed-forward half.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model under a path that leaves layers out or repeats them, where [layers belong
    /// together](moe_checkpoint::ModelConfig::inseparable), and where there are several residual streams.
    pub fn with_depth_rule(&self, rule: Arc<dyn DepthRule>) -> Result<Self> {
        if !self.path.is_whole(self.config().layers.len()) {
            return Err(Error::Unsupported("a rule that decides about layers beside a path of layers".into()));
        }
        self.check_separable("a rule that decides about layers")?;
        if self.config().streams.is_some() {
            return Err(Error::Unsupported(format!(
                "a rule that decides about layers, in `{}`, whose layers read several residual streams",
                self.config().model_type
            )));
        }
        let model = self.with_overlays(self.experts.clone(), self.routing.clone())?;
        Ok(Self { adapters: self.adapters.clone(), depth: Some(rule), ..model })
    }

    /// Refuses `what`, which needs layers that can be left out, repeated or passed, in a model whose layers
    /// [belong together](moe_checkpoint::ModelConfig::inseparable).
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check_separable(&self, what: &str) -> Result<()> {
        match self.config().inseparable() {
            Some(reason) => {
                let model = &self.config().model_type;
                Err(Error::Unsupported(format!("{what}, in a model (`{model}`) {reason}")))
            }
            None => Ok(()),
        }
    }

    /// The same model with the mean taken out of its residual stream, so that its LayerNorms run as RMSNorms: exact but
    /// for rounding (arXiv 2305.14858). The checkpoint is that of [`StreamEdit::Center`], which its family's loaders
    /// read as LayerNorms with the same outcome.
    ///
    /// # Errors
    /// Those of [`StreamEdit::on`]: for models that have no LayerNorms, or something else that reads the stream.
    /// [`Error::Unsupported`] for a model with overlays or adapters, which may write means of their own.
    pub fn with_folded_norms(&self) -> Result<Self> {
        if self.experts.is_some() || self.routing.is_some() || self.adapters.is_some() {
            return Err(Error::Unsupported("folding norms of a model with overlays or adapters".into()));
        }
        let model = self.like(StreamEdit::Center.on(&self.checkpoint)?)?;
        Ok(Self { path: self.path.clone(), depth: self.depth.clone(), centered: true, ..model })
    }

    /// The same model whose weights are decoded wherever they are used: between uses there are only the bytes that the
    /// checkpoint holds, so that a [packed](moe_checkpoint::Checkpoint::packed_in_memory) checkpoint takes the memory
    /// of its codes and scales whatever `max_memory` is, and a sweep decodes each matrix once forward and once
    /// backward. Adapters, overlays and generation work as ever, and results are the same to the bit.
    #[must_use]
    pub fn with_weights_decoded_per_use(mut self) -> Self {
        self.set_residency(Residency::default());
        self.decoded_per_use = true;
        self
    }

    /// The same model that reads its routed experts through a cache of so many bytes, for generation where they do not
    /// all fit. Without a second precision and without skipping results are those of the model. Overlays and adapters
    /// of experts do not go with it: a model that is made of this one by them has no cache.
    ///
    /// # Errors
    /// [`Error::Input`] for a threshold outside [0, 1], one of skipping below it, a model with overlays or adapters of
    /// experts, and a second precision with other experts.
    pub fn with_expert_cache(mut self, options: ExpertCacheOptions) -> Result<Self> {
        if self.experts.is_some() || self.adapters.is_some() {
            return Err(Error::input("a model with a cache of experts", "overlays or adapters", "neither"));
        }
        if let Some(low) = &options.low {
            if !(0.0..=1.0).contains(&low.threshold) {
                return Err(Error::input("threshold", low.threshold, "a number in [0, 1]"));
            }
            if low.model.shape() != self.checkpoint.shape() {
                return Err(Error::input("the second precision", "other experts", "the model's, in another format"));
            }
        }
        if let Some(skip) = options.skip {
            let least = options.low.as_ref().map_or(0.0, |low| low.threshold);
            if !(least..=1.0).contains(&skip) {
                let expected = format!("a number in [{least}, 1], from the threshold of the second precision on");
                return Err(Error::input("skip", skip, expected));
            }
        }
        self.set_residency(Residency::default());
        self.stream = Some(ExpertStream::new(&self.checkpoint, options));
        Ok(self)
    }
}
