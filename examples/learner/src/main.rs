//! A small Mixture of Experts from scratch by Burn's `Learner`: `learner [TEXT [OUT [EPOCHS]]]`.

use std::path::PathBuf;
use std::sync::Arc;

use burn::data::dataloader::{DataLoaderBuilder, batcher::Batcher};
use burn::data::dataset::InMemDataset;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::{Device, ExecutionError, Int, Tensor, TensorData, TensorReadError};
use burn::train::metric::state::{FormatOptions, NumericMetricState};
use burn::train::metric::store::{Aggregate, Direction, Split};
use burn::train::metric::{
    Adaptor, ItemLazy, LearningRateMetric, LossInput, LossMetric, Metric, MetricMetadata, MetricName, Numeric,
    NumericEntry, SerializedEntry,
};
use burn::train::{
    InferenceStep, Learner, MetricEarlyStoppingStrategy, StoppingCondition, SupervisedTraining, TrainOutput, TrainStep,
};
use moe_checkpoint::{Existing, WriteOptions, write};
use moe_nn::{
    AttentionConfig, LossWeights, MoeConfig, MoeTransformer, RoutingRecord, SharedExpertConfig, TransformerConfig,
};

const BATCH: usize = 8;
const LENGTH: usize = 64;
const RATE: f64 = 3e-3;

/// A decoder as the learner knows one.
#[derive(Module, Debug)]
struct LanguageModel {
    decoder: MoeTransformer,
}

/// What a step leaves for metrics.
struct Output {
    /// Nats per byte.
    loss: Tensor<1>,
    /// The largest load of an expert over the mean, of the layer that is least even.
    load: f64,
}

impl LanguageModel {
    fn run(&self, ids: Tensor<2, Int>) -> (Output, Option<Tensor<1>>) {
        let output = self.decoder.forward(ids.clone());
        let loads = output.routings.iter().map(|routing| f64::from(RoutingRecord::of(routing).max_over_mean));
        (Output { load: loads.fold(0.0, f64::max), loss: output.next_token_loss(ids) }, output.router_loss)
    }
}

impl TrainStep for LanguageModel {
    type Input = Tensor<2, Int>;
    type Output = Output;

    fn step(&self, ids: Tensor<2, Int>) -> TrainOutput<Output> {
        let (output, router_loss) = self.run(ids);
        let total = match router_loss {
            Some(router_loss) => output.loss.clone() + router_loss,
            None => output.loss.clone(),
        };
        TrainOutput::new(self, total.backward(), output)
    }
}

impl InferenceStep for LanguageModel {
    type Input = Tensor<2, Int>;
    type Output = Output;

    fn step(&self, ids: Tensor<2, Int>) -> Output {
        self.run(ids).0
    }
}

impl ItemLazy for Output {
    fn sync(self) -> Result<Self, ExecutionError> {
        self.loss.device().flush()?;
        Ok(Self { loss: self.loss.without_autodiff(), load: self.load })
    }
}

impl Adaptor<LossInput> for Output {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl Adaptor<f64> for Output {
    fn adapt(&self) -> f64 {
        self.load
    }
}

/// The largest load of an expert over the mean: 1 where all are as busy.
#[derive(Clone, Default)]
struct LoadMetric {
    state: NumericMetricState,
}

impl LoadMetric {
    fn format(&self) -> FormatOptions {
        FormatOptions::new(self.name()).precision(2)
    }
}

impl Metric for LoadMetric {
    type Input = f64;

    // A name of files, too.
    fn name(&self) -> MetricName {
        Arc::new("Busiest expert over mean".to_string())
    }

    fn update(&mut self, load: &f64, _: &MetricMetadata) -> Result<SerializedEntry, TensorReadError> {
        self.state.update(*load, 1);
        Ok(self.state.compute_update(self.format()))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.state.compute_final(self.format()))
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for LoadMetric {
    fn value(&self) -> Option<NumericEntry> {
        Some(self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        Some(self.state.running_value())
    }

    fn final_value(&self) -> NumericEntry {
        self.state.final_value()
    }
}

/// Pieces of a text as token ids `[batch, length]`, a byte each.
#[derive(Clone)]
struct Bytes;

impl Batcher<Vec<u8>, Tensor<2, Int>> for Bytes {
    fn batch(&self, pieces: Vec<Vec<u8>>, device: &Device) -> Tensor<2, Int> {
        let shape = [pieces.len(), LENGTH];
        let ids: Vec<i64> = pieces.into_iter().flatten().map(i64::from).collect();
        Tensor::from_data(TensorData::new(ids, shape), device)
    }
}

/// Pieces that begin every half length.
fn pieces(text: &[u8]) -> InMemDataset<Vec<u8>> {
    InMemDataset::new(text.windows(LENGTH).step_by(LENGTH / 2).map(<[u8]>::to_vec).collect())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let text = match arguments.next() {
        Some(path) => std::fs::read(path)?,
        None => include_bytes!("../../../crates/moe-nn/src/experts/mod.rs").to_vec(),
    };
    let out = PathBuf::from(arguments.next().unwrap_or_else(|| "out/learned-moe".to_string()));
    let epochs = arguments.next().map_or(Ok(8), |epochs| epochs.parse::<usize>())?;
    if text.len() < 20 * LENGTH || epochs == 0 {
        let least = 20 * LENGTH;
        return Err(format!("{} bytes of text and {epochs} epochs, expected {least} bytes and 1", text.len()).into());
    }
    // The last tenth is held out.
    let (training, held_out) = text.split_at(text.len() * 9 / 10);
    let (training, held_out) = (pieces(training), pieces(held_out));
    let steps = epochs * burn::data::dataset::Dataset::len(&training).div_ceil(BATCH);

    let device = Device::default().autodiff();
    device.seed(0);
    let losses = LossWeights { balance: 0.01, z: 0.001, ..LossWeights::default() };
    let moe = MoeConfig::new(64, 64, 8)
        .with_top_k(2)
        .with_shared(Some(SharedExpertConfig::new(64, 64).with_gated(true)))
        .with_losses(losses);
    let attention = AttentionConfig::new(4, 2, 16).with_qkv_bias(true);
    let config = TransformerConfig::new(256, 64, 2, attention, moe);
    let model = LanguageModel { decoder: config.init(&device) };
    println!("{} parameters, {steps} steps of {BATCH} x {LENGTH} bytes", model.num_params());

    let loader = || DataLoaderBuilder::new(Bytes).batch_size(BATCH);
    let early = MetricEarlyStoppingStrategy::new(
        &LossMetric::new(),
        Aggregate::Mean,
        Direction::Lowest,
        Split::Valid,
        StoppingCondition::NoImprovementSince { n_epochs: 2 },
    );
    let schedule = CosineAnnealingLrSchedulerConfig::new(RATE, steps).with_min_lr(RATE / 10.0).init()?;
    let learner = Learner::new(model, AdamWConfig::new().init(), schedule);
    let result = SupervisedTraining::new(&out, loader().shuffle(0).build(training), loader().build(held_out))
        .metrics((LossMetric::new(), LoadMetric::default()))
        .metric_train_numeric(LearningRateMetric::new())
        .with_default_checkpointers()
        .early_stopping(early)
        .num_epochs(epochs)
        .summary()
        .launch(learner);
    if let Some(error) = result.error {
        return Err(error.to_string().into());
    }

    let checkpoint = result.model.decoder.to_checkpoint(&config, None)?;
    let directory = out.join("model");
    write(&checkpoint, &directory, &WriteOptions { existing: Existing::Force, ..WriteOptions::default() })?;
    println!("{}: a `{}`", directory.display(), checkpoint.config().model_type);
    Ok(())
}
