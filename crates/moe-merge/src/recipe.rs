//! Recipes: the published methods as combinations of exchangeable parts.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::alignment::AlignmentConfig;
use crate::budget::{GroupBudget, Scope};
use crate::combination::{Combination, CombinationConfig, Reference};
use crate::compress::Compression;
use crate::evidence::SCORE;
use crate::grouping::{Grouping, GroupingConfig};
use crate::importance::Importance;
use crate::router::RouterConfig;
use crate::{Error, Result};

/// How experts are merged: one JSON file.
///
/// ```
/// use moe_merge::{Amount, GroupingConfig, Recipe};
///
/// let recipe = Recipe::named("hc-smoe")?.with_amount(Amount::Ratio(0.25));
/// assert!(matches!(recipe.grouping, GroupingConfig::Hierarchical(_)));
/// let json = serde_json::to_string_pretty(&recipe).unwrap();
/// assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe);
/// # Ok::<(), moe_merge::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What it is called.
    pub name: String,
    /// How many groups are left.
    pub budget: GroupBudget,
    /// What dominants are chosen by, and in what order the others are assigned.
    pub importance: Importance,
    /// Which experts become one.
    pub grouping: GroupingConfig,
    /// How units are matched.
    #[serde(default)]
    pub alignment: AlignmentConfig,
    /// To whose units.
    #[serde(default)]
    pub reference: Reference,
    /// How a group becomes one expert.
    pub combination: CombinationConfig,
    /// What becomes of the router.
    #[serde(default)]
    pub router: RouterConfig,
    /// Whether a layer is merged on what the layers before it give after they were merged: the model runs while it is
    /// merged.
    #[serde(default)]
    pub sequential: bool,
    /// What is done to the merged matrices afterwards (MC-SMoE).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
}

/// Names and files of the published methods.
const NAMED: [(&str, &str); 11] = [
    ("m-smoe", include_str!("recipes/m-smoe.json")),
    ("mc-smoe", include_str!("recipes/mc-smoe.json")),
    ("hc-smoe", include_str!("recipes/hc-smoe.json")),
    ("ream", include_str!("recipes/ream.json")),
    ("ream-square", include_str!("recipes/ream-square.json")),
    ("sub-moe", include_str!("recipes/sub-moe.json")),
    ("mergemoe", include_str!("recipes/mergemoe.json")),
    ("dern", include_str!("recipes/dern.json")),
    ("uncurl", include_str!("recipes/uncurl.json")),
    ("dominant-only", include_str!("recipes/dominant-only.json")),
    ("reap-sequential", include_str!("recipes/reap-sequential.json")),
];

impl Recipe {
    /// Names that [`Recipe::named`] knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMED.iter().map(|(name, _)| *name)
    }

    /// A published method, at half of its experts.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] lists the names.
    pub fn named(name: &str) -> Result<Self> {
        let found = NAMED.iter().find(|(known, _)| *known == name);
        let (_, json) = found.ok_or_else(|| {
            let known: Vec<&str> = Self::names().collect();
            Error::parameter("recipe", format!("`{name}`"), format!("one of {}", known.join(", ")))
        })?;
        Self::from_json(json)
    }

    /// Reads a recipe from JSON and checks it.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    pub fn from_json(json: &str) -> Result<Self> {
        let recipe: Self =
            serde_json::from_str(json).map_err(|error| Error::parameter("recipe", error, "a recipe as JSON"))?;
        recipe.validate()?;
        Ok(recipe)
    }

    /// The recipe that merges nothing, under this name.
    pub fn keep_all(name: &str) -> Self {
        Self {
            name: name.to_string(),
            budget: GroupBudget::new(crate::Amount::Ratio(0.0), Scope::Layer),
            importance: Importance::Equal,
            grouping: GroupingConfig::Retain(Default::default()),
            alignment: AlignmentConfig::None,
            reference: Reference::Dominant,
            combination: CombinationConfig::DominantOnly(Default::default()),
            router: RouterConfig::Delete,
            sequential: false,
            compression: None,
        }
    }

    /// The same at another budget.
    pub fn with_amount(mut self, amount: crate::Amount) -> Self {
        self.budget.amount = amount;
        self
    }

    /// Names of the statistics that it reads.
    pub fn statistics(&self) -> BTreeSet<String> {
        let weights = self.combination.weights().importance;
        let names = self.importance.statistics().into_iter().chain(weights.statistics());
        names.filter(|name| name != SCORE).collect()
    }

    /// Whether it looks at sampled tokens when it is carried out.
    pub fn fits_on_sample(&self) -> bool {
        self.alignment.needs_sample() || self.combination.needs_sample()
    }

    /// Checks all parts.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a parameter outside its range or parts that do not go together.
    pub fn validate(&self) -> Result<()> {
        self.budget.validate()?;
        self.importance.validate()?;
        self.grouping.validate()?;
        self.alignment.validate()?;
        self.combination.validate()?;
        if let Some(compression) = &self.compression {
            compression.validate()?;
        }
        if self.sequential && self.budget.scope != Scope::Layer {
            let found = moe_checkpoint::human::variant(&self.budget.scope);
            return Err(Error::parameter("budget.scope", found, "`layer` in a sequential recipe"));
        }
        if self.router.keeps_rows() && self.grouping.dissolves() {
            let name = self.grouping.recipe();
            let name = name["type"].as_str().unwrap_or_default();
            let expected = format!("`delete` or `merge`, since grouping `{name}` leaves experts without a group");
            return Err(Error::parameter("router", "`keep`", expected));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_recipe_reads_and_is_called_so() {
        for name in Recipe::names() {
            let recipe = Recipe::named(name).unwrap();
            assert_eq!(recipe.name, name);
            let json = serde_json::to_string(&recipe).unwrap();
            assert_eq!(Recipe::from_json(&json).unwrap(), recipe);
        }
        assert!(Recipe::named("m_smoe").unwrap_err().to_string().contains("m-smoe, mc-smoe"));
    }

    #[test]
    fn parts_that_do_not_go_together_are_refused() {
        let mut recipe = Recipe::named("dern").unwrap();
        recipe.router = RouterConfig::Keep;
        assert!(recipe.validate().unwrap_err().to_string().contains("retain"));
        let mut recipe = Recipe::named("ream").unwrap();
        recipe.budget.scope = Scope::Model;
        assert!(recipe.validate().unwrap_err().to_string().contains("sequential"));
        let json = serde_json::to_string(&Recipe::named("dern").unwrap()).unwrap();
        let typo = json.replace("alpha", "alfa");
        assert!(Recipe::from_json(&typo).unwrap_err().to_string().contains("alfa"));
    }
}
