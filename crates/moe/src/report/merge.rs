//! What merging made of experts.

use moe_merge::MergePlan;

use super::{ByExpert, Report};
use crate::Result;
use crate::figures::heat_map_of;
use crate::table::Table;

impl Report {
    /// Groups of a plan of merging: how many experts share weights with each, and the groups themselves.
    ///
    /// # Errors
    /// Those of drawing.
    pub fn groups(&mut self, plan: &MergePlan) -> Result<()> {
        self.section(&format!("Groups of experts by {}", plan.recipe.name));
        let experts = |layer: usize| {
            let shape = plan.shape.layers.iter().find(|shape| shape.layer == layer);
            shape.map_or(0, |shape| shape.num_experts())
        };
        let members: ByExpert = plan
            .layers
            .iter()
            .map(|layer| {
                let mut sizes = vec![0.0; experts(layer.layer)];
                for group in &layer.groups {
                    for member in &group.members {
                        if let Some(size) = sizes.get_mut(*member as usize) {
                            *size = group.members.len() as f64;
                        }
                    }
                }
                (layer.layer, sizes)
            })
            .collect();
        let caption = "Experts that become one with each, itself included. Grey goes without joining anybody.";
        self.figure(&heat_map_of("Size of the group of every expert", &members)?, caption);
        let mut table = Table::new(["layer", "experts", "groups", "largest", "dissolved", "groups of several"], 0);
        for layer in &plan.layers {
            let several = layer.groups.iter().filter(|group| group.members.len() > 1);
            let names = several.map(|group| {
                let members: Vec<String> = group.members.iter().map(ToString::to_string).collect();
                members.join("+")
            });
            let numbers = [
                layer.layer,
                experts(layer.layer),
                layer.groups.len(),
                layer.groups.iter().map(|group| group.members.len()).max().unwrap_or(0),
                layer.dissolved.len(),
            ];
            let numbers = numbers.iter().map(ToString::to_string);
            table.row(numbers.chain([names.collect::<Vec<_>>().join(", ")]));
        }
        self.table(&table);
        Ok(())
    }
}
