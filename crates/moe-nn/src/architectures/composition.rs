//! Composition of Experts: a prompt is sent to one of several whole models, in two steps.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::router::top;
use crate::routing::{host, logits};

/// Which model each category of prompts goes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CategoryTable {
    /// The model of each category, by number.
    pub models: Vec<usize>,
}

impl CategoryTable {
    /// The table with the lowest total loss whose models, each counted once however many categories it has, have at
    /// most `budget` parameters together; none if no model fits. `losses[c][m]` is the loss of model m on category c,
    /// weighted as the categories shall be. Among equals, the fewest parameters, then the lowest numbers. It is exact:
    /// all sets of up to 20 models are tried.
    ///
    /// # Panics
    ///
    /// If there are more than 20 models, or rows of other lengths than the sizes.
    pub fn best(losses: &[Vec<f64>], sizes: &[u64], budget: u64) -> Option<Self> {
        let models = sizes.len();
        assert!(models <= 20, "sets of {models} models are too many to try; leave out those that are never best");
        assert!(losses.iter().all(|row| row.len() == models), "every category needs a loss of each of {models} models");
        let mut best: Option<(f64, u64, Vec<usize>)> = None;
        for set in 1u32..1 << models {
            let members: Vec<usize> = (0..models).filter(|model| set & (1 << model) != 0).collect();
            let size: u64 = members.iter().map(|model| sizes[*model]).sum();
            if size > budget {
                continue;
            }
            let choose = |row: &Vec<f64>| {
                members.iter().copied().min_by(|a, b| row[*a].total_cmp(&row[*b]).then(a.cmp(b))).unwrap_or(members[0])
            };
            let chosen: Vec<usize> = losses.iter().map(choose).collect();
            let loss = losses.iter().zip(&chosen).map(|(row, model)| row[*model]).sum::<f64>();
            let better = best.as_ref().is_none_or(|(other_loss, other_size, _)| {
                loss.total_cmp(other_loss).then(size.cmp(other_size)).is_lt()
            });
            if better {
                best = Some((loss, size, chosen));
            }
        }
        best.map(|(_, _, models)| CategoryTable { models })
    }

    /// The models that the table needs, ascending, each once.
    pub fn members(&self) -> Vec<usize> {
        let mut members = self.models.clone();
        members.sort_unstable();
        members.dedup();
        members
    }
}

/// Configuration of [`CompositionRouter`].
#[derive(Config, Debug)]
pub struct CompositionRouterConfig {
    /// Width of a prompt's embedding.
    pub d_embedding: usize,
    /// Which model each category goes to. The last category is the general one.
    pub table: CategoryTable,
    /// Entropy in nats above which a prompt counts as general, whatever its likeliest category is; none trusts all.
    pub uncertain_above: Option<f64>,
}

/// The router of a Composition of Experts (arXiv 2412.01868): a prompt's embedding gives its category, and a table
/// gives the category's model. Categories are few and have meaning, so that the table can be made anew for other models
/// or another budget without training ([`CategoryTable::best`]). Prompts of no clear category go where the general ones
/// go.
#[derive(Module, Debug)]
pub struct CompositionRouter {
    /// Embedding to categories.
    pub category: Linear,
    #[module(skip)]
    table: CategoryTable,
    #[module(skip)]
    uncertain_above: Option<f64>,
}

/// Where prompts go.
#[derive(Clone, Debug)]
pub struct Composed {
    /// Logits of categories, `[prompts, categories]`.
    pub logits: Tensor<2>,
    /// The category of each prompt.
    pub categories: Vec<usize>,
    /// The model of each prompt.
    pub models: Vec<usize>,
}

impl CompositionRouterConfig {
    /// Makes the router.
    ///
    /// # Panics
    ///
    /// If the table has no category.
    pub fn init(&self, device: &Device) -> CompositionRouter {
        let categories = self.table.models.len();
        assert!(categories > 0, "the table has no category");
        CompositionRouter {
            category: LinearConfig::new(self.d_embedding, categories).init(device),
            table: self.table.clone(),
            uncertain_above: self.uncertain_above,
        }
    }
}

impl CompositionRouter {
    /// This router with another table of the same categories.
    ///
    /// # Panics
    ///
    /// If it has another number of them.
    pub fn with_table(mut self, table: CategoryTable) -> Self {
        let (known, found) = (self.table.models.len(), table.models.len());
        assert_eq!(known, found, "the router knows {known} categories, the table has {found}");
        self.table = table;
        self
    }

    /// Sends prompts, by their embeddings `[prompts, d_embedding]`.
    pub fn forward(&self, embeddings: Tensor<2>) -> Composed {
        let logits = logits(embeddings, &self.category);
        let columns = self.table.models.len();
        let logs = host(&log_softmax(logits.clone(), 1));
        let category = |row: &[f32]| {
            let entropy = -row.iter().map(|log| f64::from(log.exp() * log)).sum::<f64>();
            match self.uncertain_above.is_some_and(|limit| entropy > limit) {
                true => columns - 1,
                false => top(row, 1)[0] as usize,
            }
        };
        let categories: Vec<usize> = logs.chunks_exact(columns).map(category).collect();
        let models = categories.iter().map(|category| self.table.models[*category]).collect();
        Composed { logits, categories, models }
    }
}

impl Composed {
    /// The cross-entropy of the categories against their labels, mean over prompts.
    ///
    /// # Panics
    ///
    /// If there is not one label per prompt.
    pub fn category_loss(&self, labels: &[usize]) -> Tensor<1> {
        let prompts = self.categories.len();
        assert_eq!(labels.len(), prompts, "{prompts} prompts, but {} labels", labels.len());
        let labels: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
        let labels = Tensor::<2, Int>::from_data(TensorData::new(labels, [prompts, 1]), &self.logits.device());
        -log_softmax(self.logits.clone(), 1).gather(1, labels).mean()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_the_best_that_its_budget_buys() {
        let losses = vec![vec![1.0, 0.2, 0.9], vec![0.9, 1.0, 0.1], vec![0.5, 0.6, 0.6]];
        let sizes = [10, 7, 7];
        let models = |budget| CategoryTable::best(&losses, &sizes, budget).map(|table| table.models);
        assert_eq!(models(24), Some(vec![1, 2, 0]));
        assert_eq!(models(14), Some(vec![1, 2, 1])); // a tie of the last category goes to the lower number
        assert_eq!(models(7), Some(vec![2, 2, 2])); // 1.6 against 1.8
        assert_eq!(models(6), None);
        assert_eq!(CategoryTable { models: vec![2, 0, 2] }.members(), [0, 2]);
    }
}
