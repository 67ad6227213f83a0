//! What a run found.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::format::{count, percent, short, size};
use crate::table::Table;
use moe::eval_file::EvalFile;

/// One checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Eval {
    /// `NAME_exact` or `NAME_ppl` and its value, per evaluation file.
    #[serde(with = "exact")]
    pub metrics: Vec<(String, f64)>,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Tokens generated per second for a batch of prompts; where nothing is generated, tokens predicted per second.
    pub tokens_per_s: Option<f64>,
    /// Where it is.
    pub export_dir: PathBuf,
}

impl Eval {
    /// As an object with a key per metric.
    pub fn to_json(&self) -> Value {
        let mut object: Map<String, Value> =
            self.metrics.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        object.insert("parameters".into(), json!(self.parameters));
        object.insert("bytes".into(), json!(self.bytes));
        object.insert("tokens_per_s".into(), json!(self.tokens_per_s));
        object.insert("export_dir".into(), json!(self.export_dir));
        Value::Object(object)
    }
}

/// A method at one ratio.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodResult {
    /// Name of the method.
    pub method: &'static str,
    /// Fraction of units asked to drop.
    pub ratio: f64,
    /// Fraction dropped: width multiples and floors may differ.
    pub dropped: f64,
    /// What is left.
    pub eval: Eval,
}

/// What a run found.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// The model directory.
    pub model: PathBuf,
    /// The model as it was.
    pub base: Eval,
    /// Methods in order, each with its ratios in order.
    pub methods: Vec<MethodResult>,
}

impl Results {
    /// One object: `{"model", "base": {eval}, "methods": {METHOD: {RATIO: {eval}}}}`.
    pub fn to_json(&self) -> Value {
        let mut methods = Map::new();
        for result in &self.methods {
            let ratios = methods.entry(result.method).or_insert_with(|| json!({}));
            ratios[result.ratio.to_string()] = result.eval.to_json();
        }
        json!({ "model": self.model, "base": self.base.to_json(), "methods": methods })
    }

    /// A row per checkpoint.
    pub fn table(&self, evals: &[EvalFile]) -> Table {
        let mut header: Vec<String> = ["method", "dropped"].map(String::from).into();
        header.extend(evals.iter().map(EvalFile::key));
        header.extend(["parameters", "bytes", "tokens/s"].map(String::from));
        let mut table = Table::new(header, 1);
        let cells = |method: &str, dropped: String, eval: &Eval| -> Vec<String> {
            let metric = |(key, value): &(String, f64)| match key.ends_with("_exact") {
                true => format!("{value:.3}"),
                false => short(*value),
            };
            let mut cells = vec![method.to_string(), dropped];
            cells.extend(eval.metrics.iter().map(metric));
            cells.push(count(eval.parameters));
            cells.push(size(eval.bytes));
            cells.push(eval.tokens_per_s.map_or("-".into(), |speed| count(speed.round() as u64)));
            cells
        };
        table.row(cells("(before)", "0%".into(), &self.base));
        for result in &self.methods {
            table.row(cells(result.method, percent(result.dropped), &result.eval));
        }
        table
    }
}

/// Numbers as text: reading JSON numbers costs their last bit, and what is taken over must not change.
mod exact {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer>(metrics: &[(String, f64)], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(metrics.iter().map(|(key, value)| (key, value.to_string())))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, f64)>, D::Error> {
        let metrics = Vec::<(String, String)>::deserialize(deserializer)?;
        metrics.into_iter().map(|(key, value)| Ok((key, value.parse().map_err(D::Error::custom)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_keep_every_bit() {
        let metrics = vec![("a_ppl".to_string(), 127.08235264586352), ("b_exact".to_string(), f64::INFINITY)];
        let eval = Eval { metrics, parameters: 1, bytes: 2, tokens_per_s: None, export_dir: "x".into() };
        let json = serde_json::to_string(&eval).unwrap();
        assert_eq!(serde_json::from_str::<Eval>(&json).unwrap(), eval);
    }
}
