//! Sums of score tables: one scorer on several sets of data.

use serde_json::json;

use crate::{Denominator, Error, LayerScores, Provenance, Result, ScoreTable, WholeScores};

impl ScoreTable {
    /// `sum_i weight_i table_i` of tables of one scorer and one model on different data: a mixture of domains that is
    /// weighed after scoring, without collecting anything again. Weights are taken as they are; those that sum to 1
    /// give a mean.
    ///
    /// The counts of routed tokens are added where all tables have them, so that an expert counts as never routed only
    /// if no domain routed to it. The provenance names the model, and every part with its weight in the recipe.
    ///
    /// # Errors
    /// [`Error::InvalidScores`] names the table (from 0), the field, what was found and what was expected: no table, a
    /// weight that is no number from 0 on, all weights 0, tables of ranks, of another scorer, granularity, pool,
    /// denominator, model or shape, or of data that another table has already; those of [`ScoreTable::validate`].
    ///
    /// ```
    /// # use moe_checkpoint::{Denominator, Granularity, LayerScores, Pool, Provenance, ScoreTable};
    /// # let table = |data: &str, scores: [f32; 2]| ScoreTable {
    /// #     scorer: r#"{"type":"frequency"}"#.into(),
    /// #     granularity: Granularity::Expert,
    /// #     pool: Pool::Global,
    /// #     additive: None,
    /// #     denominator: Denominator::AllTokens,
    /// #     layers: vec![LayerScores { layer: 0, scores: scores.map(|s| vec![s]).into(), routed: None, whole: None }],
    /// #     provenance: Provenance::new("model", data, "{}"),
    /// # };
    /// let (code, prose) = (table("code", [1.0, 0.0]), table("prose", [0.0, 0.5]));
    /// let mixed = ScoreTable::weighted_sum(&[(0.25, &code), (0.75, &prose)])?;
    /// assert_eq!(mixed.layers[0].scores, [[0.25], [0.375]]);
    /// assert!(ScoreTable::weighted_sum(&[(0.5, &code), (0.5, &code)]).is_err());
    /// # Ok::<(), moe_checkpoint::Error>(())
    /// ```
    pub fn weighted_sum(tables: &[(f64, &ScoreTable)]) -> Result<ScoreTable> {
        let invalid = |reason: String| Error::InvalidScores { reason };
        let Some(((_, first), others)) = tables.split_first() else {
            return Err(invalid("a sum of no tables: found 0, expected at least 1".into()));
        };
        if first.denominator == Denominator::Ranks {
            return Err(invalid("table 0: ranks cannot be added, for they are places and not amounts".into()));
        }
        for (index, (weight, table)) in tables.iter().enumerate() {
            table.validate()?;
            if !(weight.is_finite() && *weight >= 0.0) {
                return Err(invalid(format!("table {index}: weight: found {weight}, expected a number of 0 or more")));
            }
            let same_data = |other: &(f64, &ScoreTable)| other.1.provenance.data == table.provenance.data;
            if let Some(other) = tables[..index].iter().position(same_data) {
                let data = &table.provenance.data;
                return Err(invalid(format!("table {index}: data: found `{data}`, which table {other} has already")));
            }
        }
        if tables.iter().all(|(weight, _)| *weight == 0.0) {
            return Err(invalid("weights: found 0 for every table, expected one above 0".into()));
        }
        for (index, (_, table)) in others.iter().enumerate() {
            table.expect_like(first).map_err(|difference| invalid(format!("table {}: {difference}", index + 1)))?;
        }
        let mut sum = (*first).clone();
        for (position, layer) in sum.layers.iter_mut().enumerate() {
            let parts: Vec<(f64, &LayerScores)> =
                tables.iter().map(|(w, table)| (*w, &table.layers[position])).collect();
            for (expert, values) in layer.scores.iter_mut().enumerate() {
                for (unit, value) in values.iter_mut().enumerate() {
                    *value = parts.iter().map(|(w, part)| w * f64::from(part.scores[expert][unit])).sum::<f64>() as f32;
                }
            }
            layer.routed = parts
                .iter()
                .map(|(_, part)| part.routed.as_deref())
                .try_fold(vec![0u64; layer.scores.len()], |sum, routed| {
                    Some(sum.iter().zip(routed?).map(|(sum, count)| sum + count).collect())
                });
            layer.whole = whole_sum(&parts);
        }
        let part = |(weight, table): &(f64, &ScoreTable)| {
            let Provenance { data, recipe, .. } = &table.provenance;
            json!({ "weight": weight, "data": data, "recipe": recipe })
        };
        let recipe = json!({ "sum": tables.iter().map(part).collect::<Vec<_>>() }).to_string();
        let data = blake3::hash(recipe.as_bytes()).to_hex().to_string();
        sum.provenance = Provenance::new(first.provenance.model.clone(), data, recipe);
        sum.validate()?;
        Ok(sum)
    }

    /// What differs from `first` that must not; the data may.
    fn expect_like(&self, first: &ScoreTable) -> std::result::Result<(), String> {
        let differs = |field: &str, found: String, expected: String| match found == expected {
            true => Ok(()),
            false => Err(format!("{field}: found {found}, expected {expected} as in table 0")),
        };
        differs("scorer", self.scorer.clone(), first.scorer.clone())?;
        differs("granularity", self.granularity.to_string(), first.granularity.to_string())?;
        differs("pool", self.pool.to_string(), first.pool.to_string())?;
        let additive = |table: &ScoreTable| table.additive.map_or("nothing".to_string(), |pool| pool.to_string());
        differs("additive", additive(self), additive(first))?;
        differs("denominator", self.denominator.to_string(), first.denominator.to_string())?;
        let wholes = |table: &ScoreTable| match table.layers.iter().all(|layer| layer.whole.is_some()) {
            true => "weights of layers and experts".to_string(),
            false => "none".to_string(),
        };
        differs("wholes", wholes(self), wholes(first))?;
        differs("model", self.provenance.model.clone(), first.provenance.model.clone())?;
        let layers = |table: &ScoreTable| format!("{:?}", table.layers.iter().map(|l| l.layer).collect::<Vec<_>>());
        differs("MoE layers", layers(self), layers(first))?;
        for (ours, theirs) in self.layers.iter().zip(&first.layers) {
            let widths = |layer: &LayerScores| format!("{:?}", layer.scores.iter().map(Vec::len).collect::<Vec<_>>());
            differs(&format!("scores per expert of layer {}", ours.layer), widths(ours), widths(theirs))?;
        }
        Ok(())
    }
}

/// The weights of wholes of all parts together; none where a part has none.
fn whole_sum(parts: &[(f64, &LayerScores)]) -> Option<WholeScores> {
    let wholes: Vec<(f64, &WholeScores)> =
        parts.iter().map(|(weight, part)| Some((*weight, part.whole.as_ref()?))).collect::<Option<_>>()?;
    let sum = |value: &dyn Fn(&WholeScores) -> f32| {
        wholes.iter().map(|(weight, whole)| weight * f64::from(value(whole))).sum::<f64>() as f32
    };
    let experts = wholes.first()?.1.experts.len();
    Some(WholeScores {
        layer: sum(&|whole| whole.layer),
        experts: (0..experts).map(|expert| sum(&|whole| whole.experts[expert])).collect(),
    })
}
