//! Choosing layers of a model by what they change.

use serde::{Deserialize, Serialize};

use super::{Influence, LayerInfluence, attention_ranks};
use crate::{
    Engine, EngineOptions, Model,
    data::Wave,
    error::{Error, Result},
};

/// Which layers of a model are taken out, or skipped by tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum LayerChoice {
    /// Those with the least block influence, wherever they are (ShortGPT).
    Influence {
        /// Layers that are chosen.
        layers: usize,
    },
    /// The span of neighbors with the least angular distance (arXiv 2403.17887).
    Angular {
        /// Layers that are chosen.
        layers: usize,
    },
    /// The deepest ones but the last: the same paper's simple rule, which needs healing.
    Deepest {
        /// Layers that are chosen.
        layers: usize,
    },
    /// Those whose attention maps have the least rank (ARank of gamma-MoD, arXiv 2410.13859).
    AttentionRank {
        /// Layers that are chosen.
        layers: usize,
    },
    /// The layers of a list.
    List {
        /// The layers.
        layers: Vec<usize>,
    },
}

impl LayerChoice {
    /// Whether it looks at how a model changes what goes through it.
    pub fn needs_rows(&self) -> bool {
        matches!(self, Self::Influence { .. } | Self::Angular { .. } | Self::AttentionRank { .. })
    }

    /// Number of layers that it chooses.
    pub fn count(&self) -> usize {
        match self {
            Self::Influence { layers }
            | Self::Angular { layers }
            | Self::Deepest { layers }
            | Self::AttentionRank { layers } => *layers,
            Self::List { layers } => layers.len(),
        }
    }

    /// What it has to have seen of a model to choose, by running it on `waves`; `None` for a choice that looks at
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Input`] for no tokens; whatever stops the model.
    pub fn measure(&self, model: &Model, waves: &[Wave]) -> Result<Option<Vec<LayerInfluence>>> {
        if !self.needs_rows() {
            return Ok(None);
        }
        let mut seen = Influence::new(model.config().layers.len());
        let engine = Engine::new(model, EngineOptions::default());
        waves.iter().try_for_each(|wave| engine.run(wave, &mut seen).map(drop))?;
        let mut layers = seen.layers()?;
        if matches!(self, Self::AttentionRank { .. }) {
            let ranks = attention_ranks(model, waves)?;
            layers.iter_mut().zip(ranks).for_each(|(layer, rank)| layer.attention_rank = rank);
        }
        Ok(Some(layers))
    }

    /// The layers that it chooses of a model of so many, ascending, by what was seen of it.
    ///
    /// # Errors
    /// [`Error::Input`] for more layers than may go, and for a choice without what it needs to have seen.
    pub fn layers(&self, count: usize, seen: Option<&[LayerInfluence]>) -> Result<Vec<usize>> {
        self.layers_among(count, seen, |_| true)
    }

    /// The same of the layers that `may` be chosen; those of a list are, whether they may or not.
    ///
    /// # Errors
    /// As [`layers`](Self::layers), and [`Error::Input`] if too few may be chosen.
    pub fn layers_among(
        &self,
        count: usize,
        seen: Option<&[LayerInfluence]>,
        may: impl Fn(usize) -> bool,
    ) -> Result<Vec<usize>> {
        let most = match self {
            Self::Deepest { .. } => count.saturating_sub(2),
            _ => count.saturating_sub(1),
        };
        let n = self.count();
        if n > most {
            return Err(Error::input("layers to choose", n, format!("at most {most} of {count}")));
        }
        let available = (0..count).filter(|layer| may(*layer)).count();
        if n > available && !matches!(self, Self::List { .. }) {
            return Err(Error::input("layers to choose", n, format!("at most the {available} that may be chosen")));
        }
        let seen = || match seen {
            Some(seen) if seen.len() == count => Ok(seen),
            Some(seen) => Err(Error::input("layers with an influence", seen.len(), count)),
            None => Err(Error::input("influence of layers", "none", "rows that it is measured on")),
        };
        Ok(match self {
            Self::List { layers } => {
                let mut layers = layers.clone();
                layers.sort_unstable();
                layers.dedup();
                if let Some(layer) = layers.iter().find(|layer| **layer >= count) {
                    return Err(Error::input("layer to choose", layer, format!("below {count}")));
                }
                layers
            }
            Self::Deepest { .. } => {
                let mut layers: Vec<usize> = (0..count - 1).rev().filter(|layer| may(*layer)).take(n).collect();
                layers.reverse();
                layers
            }
            Self::Influence { .. } => {
                let influences = seen()?.iter().filter(|found| may(found.layer));
                least(n, influences.map(|found| (found.layer, found.block)))
            }
            Self::AttentionRank { .. } => {
                let ranks = seen()?
                    .iter()
                    .filter(|found| may(found.layer))
                    .filter_map(|found| Some((found.layer, found.attention_rank?)));
                let ranks: Vec<(usize, f64)> = ranks.collect();
                if n > ranks.len() {
                    let expected = format!("at least {n}");
                    return Err(Error::input("layers with ranks of attention maps", ranks.len(), expected));
                }
                least(n, ranks.into_iter())
            }
            Self::Angular { .. } if n == 0 => Vec::new(),
            Self::Angular { .. } => {
                let seen = seen()?;
                let distance = |start: &usize| seen[*start].spans[n - 1];
                let starts = (0..=count - n).filter(|start| (*start..start + n).all(&may));
                let Some(start) = starts.min_by(|a, b| distance(a).total_cmp(&distance(b))) else {
                    return Err(Error::input("neighbors to choose", 0, format!("{n} layers that may be chosen")));
                };
                (start..start + n).collect()
            }
        })
    }
}

/// The `n` layers with the smallest values, ascending; of equal ones, the earlier.
fn least(n: usize, values: impl Iterator<Item = (usize, f64)>) -> Vec<usize> {
    let mut order: Vec<(usize, f64)> = values.collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    let mut layers: Vec<usize> = order.into_iter().take(n).map(|(layer, _)| layer).collect();
    layers.sort_unstable();
    layers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(blocks: &[f64], spans: &[&[f64]]) -> Vec<LayerInfluence> {
        let of = |(layer, (block, spans)): (usize, (&f64, &&[f64]))| LayerInfluence {
            layer,
            block: *block,
            feed_forward: None,
            norm_ratio: 1.0,
            spans: spans.to_vec(),
            attention_rank: Some(1.0 + (4.0 - layer as f64).abs()),
        };
        blocks.iter().zip(spans).enumerate().map(of).collect()
    }

    #[test]
    fn rules_choose_the_least_influence_the_closest_span_and_the_deepest_but_the_last() {
        let table = seen(
            &[0.5, 0.1, 0.3, 0.05, 0.4, 0.6],
            &[
                &[0.3, 0.4, 0.5, 0.5, 0.6, 0.7],
                &[0.1, 0.35, 0.4, 0.5, 0.5],
                &[0.2, 0.2, 0.4, 0.4],
                &[0.05, 0.3, 0.4],
                &[0.2, 0.5],
                &[0.6],
            ],
        );
        let choose = |rule: LayerChoice| rule.layers(6, Some(&table)).unwrap();
        assert_eq!(choose(LayerChoice::Influence { layers: 2 }), [1, 3]);
        // spans [a, b) of 2 layers: the least is [2, 4)
        assert_eq!(choose(LayerChoice::Angular { layers: 2 }), [2, 3]);
        assert_eq!(choose(LayerChoice::Angular { layers: 1 }), [3]);
        assert_eq!(choose(LayerChoice::Angular { layers: 3 }), [1, 2, 3]);
        assert_eq!(choose(LayerChoice::Deepest { layers: 2 }), [3, 4]);
        assert_eq!(choose(LayerChoice::List { layers: vec![4, 0, 4] }), [0, 4]);
        assert_eq!(choose(LayerChoice::Angular { layers: 0 }), [0usize; 0]);
        assert_eq!(choose(LayerChoice::AttentionRank { layers: 3 }), [3, 4, 5]);
        let among = |rule: LayerChoice| rule.layers_among(6, Some(&table), |layer| layer != 3);
        assert_eq!(among(LayerChoice::Influence { layers: 2 }).unwrap(), [1, 2]);
        assert_eq!(among(LayerChoice::Angular { layers: 2 }).unwrap(), [1, 2]);
        assert_eq!(among(LayerChoice::Deepest { layers: 2 }).unwrap(), [2, 4]);
        assert_eq!(among(LayerChoice::AttentionRank { layers: 3 }).unwrap(), [2, 4, 5]);
        assert!(among(LayerChoice::Angular { layers: 4 }).unwrap_err().to_string().contains("neighbors to choose"));
        let none = LayerChoice::Influence { layers: 1 }.layers_among(6, Some(&table), |_| false).unwrap_err();
        assert!(none.to_string().contains("at most the 0 that may be chosen"), "{none}");
        let error = LayerChoice::Influence { layers: 6 }.layers(6, Some(&table)).unwrap_err().to_string();
        assert!(error.contains("found 6, expected at most 5 of 6"), "{error}");
        let error = LayerChoice::Angular { layers: 1 }.layers(6, None).unwrap_err().to_string();
        assert!(error.contains("influence of layers"), "{error}");
    }
}
