//! What can go wrong while statistics are collected or turned into scores.

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can fail in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Statistics, scores or weights could not be read, written or combined.
    #[error(transparent)]
    Checkpoint(#[from] moe_checkpoint::Error),
    /// The model could not be run, or an observer refused what it saw.
    #[cfg(feature = "collect")]
    #[error(transparent)]
    Run(#[from] moe_core::Error),
    /// A scorer name that is not known.
    #[error("scorer `{found}` is not known; there are {known}")]
    UnknownScorer {
        /// The name found.
        found: String,
        /// Comma-separated names of all scorers.
        known: String,
    },
    /// A scorer description that is not one: not an object, a field missing, unknown or out of range.
    #[error("scorer `{scorer}`: field `{field}`: {reason}")]
    InvalidField {
        /// The scorer, `?` where that is what is missing.
        scorer: String,
        /// The field.
        field: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// A scorer description that is not a JSON object.
    #[error("a scorer is a JSON object with a field `type`, found {found}")]
    NotAnObject {
        /// What was found.
        found: String,
    },
    /// No collector provides a statistic.
    #[error("no collector provides statistic `{id}`; known statistics are {known}")]
    UnknownStatistic {
        /// The statistic asked for.
        id: String,
        /// Comma-separated ids of all statistics.
        known: String,
    },
    /// Two collectors of one collection add to the same statistic.
    #[error("statistic `{id}` is provided by two collectors of one collection")]
    DuplicateStatistic {
        /// The statistic.
        id: String,
    },
    /// A scorer got statistics that lack what it needs.
    #[error("scorer `{scorer}` needs statistic `{id}`, but the statistics hold {found}")]
    MissingStatistic {
        /// The scorer.
        scorer: String,
        /// The statistic it needs.
        id: String,
        /// Comma-separated ids of the statistics there are.
        found: String,
    },
    /// There is no data to divide by.
    #[error("{what}: no calibration data: found 0 {counted}, expected at least 1")]
    NoData {
        /// What needs the data.
        what: String,
        /// What was counted: waves, tokens, sequences.
        counted: &'static str,
    },
    /// A scorer reads expert weights, but got none.
    #[error("weights of layer {layer}, expert {expert} are needed, but no checkpoint was given")]
    NoWeights {
        /// Decoder layer index.
        layer: usize,
        /// Expert index.
        expert: usize,
    },
    /// A scorer reads router weights, but got none.
    #[error("the router weight of layer {layer} is needed, but no checkpoint was given")]
    NoRouter {
        /// Decoder layer index.
        layer: usize,
    },
    /// Router weights of another model than the statistics.
    #[error(
        "layer {layer}: a router weight of {found} values, but the statistics have experts times hidden size = {expected}"
    )]
    RouterMismatch {
        /// Decoder layer index.
        layer: usize,
        /// Values of the weight.
        found: usize,
        /// Values expected.
        expected: usize,
    },
    /// Expert weights of another model than the statistics.
    #[error("layer {layer}, expert {expert}: weights of {found} units, but the statistics have {expected}")]
    WeightsMismatch {
        /// Decoder layer index.
        layer: usize,
        /// Expert index.
        expert: usize,
        /// Units of the weights.
        found: usize,
        /// Units of the statistics.
        expected: usize,
    },
    /// A score that is not a finite f32.
    #[error(
        "scorer `{scorer}`: the score of layer {layer}, expert {expert}, unit {unit} is {value}, expected a finite number"
    )]
    NonFiniteScore {
        /// The scorer.
        scorer: String,
        /// Decoder layer index.
        layer: usize,
        /// Expert index.
        expert: usize,
        /// Unit index.
        unit: usize,
        /// The value.
        value: f64,
    },
    /// A trace that contradicts itself or lacks what was asked for: a fault of what runs the model.
    #[error("trace of layer {layer}{}: {field}: found {found}, expected {expected}", of_expert(*expert))]
    Trace {
        /// Decoder layer index.
        layer: usize,
        /// Expert index, for the trace of an expert.
        expert: Option<usize>,
        /// Part of the trace.
        field: &'static str,
        /// What it was.
        found: String,
        /// What it should have been.
        expected: String,
    },
    /// Traces came outside a wave, or a wave ended that had not begun.
    #[error("{what}: found {found}, expected {expected}")]
    WaveOrder {
        /// What happened.
        what: &'static str,
        /// The wave in progress or finished.
        found: String,
        /// The wave that should have been.
        expected: String,
    },
    /// A store of the same data that was collected for fewer statistics.
    #[error(
        "{}: its waves hold {found}, but {missing} is asked for as well: collect into another directory", store.display()
    )]
    StoreLacks {
        /// Directory of the store.
        store: std::path::PathBuf,
        /// Comma-separated ids of the statistics that it lacks.
        missing: String,
        /// Comma-separated ids of those that it holds.
        found: String,
    },
    /// The same wave id twice in one collection.
    #[error("wave {id} is listed twice")]
    DuplicateWave {
        /// The id.
        id: u64,
    },
}

fn of_expert(expert: Option<usize>) -> String {
    expert.map(|expert| format!(", expert {expert}")).unwrap_or_default()
}
