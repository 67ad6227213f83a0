//! Which maps a config is about.

use std::collections::BTreeMap;

use fancy_regex::Regex;
use moe_checkpoint::{ExpertMatrix, LayerRole, MatrixId};

use super::{
    config::{LoraConfig, Patterns, Targets},
    maps::{Maps, Naming},
};
use crate::{Error, Result};

/// What a map gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Rank of its addition.
    pub rank: usize,
    /// `lora_alpha` of its addition.
    pub alpha: f64,
}

impl LoraConfig {
    /// The maps that are adapted, and with what, by PEFT's rules:
    ///
    /// - a list names modules by their path or the end of it, a pattern by the whole path; `all-linear` is every linear
    ///   module of a layer but the router, which transformers keeps as a parameter;
    /// - `exclude_modules` are taken away, then all but `layers_to_transform`;
    /// - `target_parameters` name the experts of a layer together, or a router's `weight`;
    /// - ranks and alphas of the first pattern that matches the end of the path.
    ///
    /// With [`Naming::Fused`] routed experts are no modules. With [`Naming::PerExpert`] they are, so that `gate_proj`
    /// means those of the experts, too.
    ///
    /// # Errors
    /// [`Error::Input`] for a malformed pattern, a name that matches nothing, a map that is named in two ways, and a
    /// rank above what a decomposition of a weight gives.
    pub fn targets(&self, maps: &Maps<'_>) -> Result<BTreeMap<MatrixId, Share>> {
        self.validate()?;
        let ranks = Compiled::new("rank_pattern", &self.rank_pattern)?;
        let alphas = Compiled::new("alpha_pattern", &self.alpha_pattern)?;
        let share = |paths: &[&str]| Share {
            rank: paths.iter().find_map(|path| ranks.find(path)).unwrap_or(self.r),
            alpha: paths.iter().find_map(|path| alphas.find(path)).unwrap_or(self.lora_alpha),
        };
        let mut found = BTreeMap::new();
        if let Some(targets) = &self.target_modules {
            let include = Matcher::new("target_modules", targets)?;
            let exclude = self.exclude_modules.as_ref().map(|t| Matcher::new("exclude_modules", t)).transpose()?;
            let mut used = vec![false; include.names()];
            for map in maps.all() {
                let expert = matches!(map, MatrixId::Expert { .. });
                if expert && self.naming == Naming::Fused {
                    continue;
                }
                let path = maps.path(*map, self.naming);
                let matched = (0..include.names()).filter(|name| include.matches(*name, &path, *map));
                if matched.fold(0, |count, name| {
                    used[name] = true;
                    count + 1
                }) == 0
                {
                    continue;
                }
                let excluded = exclude
                    .as_ref()
                    .is_some_and(|exclude| (0..exclude.names()).any(|name| exclude.matches(name, &path, *map)));
                if !excluded && map.layer().is_some_and(|layer| self.transforms(&path, layer)) {
                    found.insert(*map, share(&[&path]));
                }
            }
            if let Some(name) = used.iter().position(|used| !used) {
                if let Targets::List(names) = targets
                    && ["lm_head", "embed_tokens", "embed_out", "wte"].iter().any(|end| ends_with(&names[name], end))
                {
                    let expected = "maps of decoder layers: new adapters have no low-rank additions to embeddings and output head. Their \
                                    own weights can be trained: name them in `modules_to_save`, or rows of tokens in \
                                    `trainable_token_indices`, or use {\"type\": \"own\", \"head\": true}";
                    return Err(Error::input("target_modules", format!("`{}`", names[name]), expected));
                }
                let expected = format!("names of modules such as {}", examples(maps, self.naming));
                return Err(Error::input("target_modules", include.name(name), expected));
            }
        }
        for parameter in &self.target_parameters {
            let named = parameter_maps(maps, parameter);
            if named.is_empty() {
                let expected =
                    "a parameter such as `mlp.experts.gate_up_proj`, `mlp.experts.down_proj` or `mlp.gate.weight`";
                return Err(Error::input("target_parameters", format!("`{parameter}`"), expected));
            }
            for (map, paths) in named {
                let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
                let halves = [ExpertMatrix::Gate, ExpertMatrix::Up];
                let half = |part| match map {
                    MatrixId::Expert { layer, expert, part: ExpertMatrix::GateUp } => {
                        MatrixId::Expert { layer, expert, part }
                    }
                    map => map,
                };
                let twice = halves.into_iter().map(half).find(|map| found.contains_key(map));
                if let Some(twice) = twice {
                    let expected = "one of both: additions to one map are those of several adapters";
                    return Err(Error::input(
                        format!("targets of {twice}"),
                        format!("`target_modules` and `{parameter}`"),
                        expected,
                    ));
                }
                found.insert(map, share(&paths));
            }
        }
        // Experts without units have nothing to add to.
        found.retain(|map, share| share.rank > 0 && maps.dims(*map).is_some_and(|dims| !dims.contains(&0)));
        if found.is_empty() {
            return Err(Error::input("target_modules", "nothing to adapt", "at least one map of a rank above 0"));
        }
        let odd = found.iter().find(|(_, share)| !share.rank.is_multiple_of(2));
        if let (super::Init::Orthogonal, Some((map, share))) = (self.init_lora_weights, odd) {
            return Err(Error::input(format!("rank of {map}"), share.rank, "an even one for \"orthogonal\""));
        }
        if self.init_lora_weights.changes_base() {
            for (map, Share { rank, .. }) in &found {
                let [out, inputs] = maps.dims(*map).unwrap_or_default();
                if *rank > out.min(inputs) {
                    let expected = format!("at most {}, the smaller side of its {out} x {inputs}", out.min(inputs));
                    return Err(Error::input(format!("rank of {map}"), rank, expected));
                }
            }
        }
        Ok(found)
    }

    fn transforms(&self, path: &str, layer: usize) -> bool {
        let Some(layers) = &self.layers_to_transform else { return true };
        let Some(patterns) = self.layers_pattern.as_ref().filter(|patterns| !patterns.is_empty()) else {
            return layers.contains(&layer);
        };
        let segments: Vec<&str> = path.split('.').collect();
        let after = |pattern: &String| {
            let number = segments.windows(2).find(|pair| pair[0] == pattern)?[1].parse().ok()?;
            Some(number)
        };
        patterns.iter().find_map(after).is_some_and(|layer: usize| layers.contains(&layer))
    }
}

/// The maps of a parameter, with the paths that patterns are matched with, the narrowest first.
fn parameter_maps(maps: &Maps<'_>, parameter: &str) -> Vec<(MatrixId, Vec<String>)> {
    let mut found = Vec::new();
    for layer in 0..maps.checkpoint().config().layers.len() {
        let experts = maps.experts(layer);
        if experts == 0 {
            continue;
        }
        for naming in [Naming::Fused, Naming::PerExpert] {
            let base = maps.experts_path(layer, naming);
            for (part, name) in maps.fused_parameters(layer) {
                // One name for every family, beside what transformers calls a module of its own.
                let common = format!("{base}.{name}");
                let path = match maps.expert_matrices_are_modules() {
                    true => {
                        let (module, name) = maps.fused_parameter(layer, part);
                        format!("{module}.{name}")
                    }
                    false => common.clone(),
                };
                if ends_with(&path, parameter) || ends_with(&common, parameter) {
                    found.extend((0..experts).map(|expert| {
                        let map = MatrixId::Expert { layer, expert, part };
                        (map, vec![format!("{base}.{expert}.{name}"), path.clone()])
                    }));
                }
            }
            let router = MatrixId::Layer(layer, LayerRole::Router);
            let path = format!("{}.weight", maps.path(router, naming));
            if ends_with(&path, parameter) {
                found.push((router, vec![path]));
            }
        }
    }
    found.sort_by_key(|(map, _)| *map);
    found.dedup_by_key(|(map, _)| *map);
    found
}

/// Whether a path is `name` or ends with it after a dot.
pub(crate) fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn examples(maps: &Maps<'_>, naming: Naming) -> String {
    let mut names: Vec<String> = maps
        .all()
        .iter()
        .filter(|map| naming == Naming::PerExpert || matches!(map, MatrixId::Layer(..)))
        .filter_map(|map| maps.path(*map, naming).rsplit_once('.').map(|(_, name)| format!("`{name}`")))
        .collect();
    names.sort();
    names.dedup();
    names.join(", ")
}

enum Matcher {
    List(Vec<String>),
    AllLinear,
    Whole(String, Box<Regex>),
}

impl Matcher {
    fn new(field: &str, targets: &Targets) -> Result<Self> {
        Ok(match targets {
            Targets::List(names) => Self::List(names.clone()),
            Targets::Pattern(pattern) if pattern == "all-linear" => Self::AllLinear,
            Targets::Pattern(pattern) => {
                Self::Whole(pattern.clone(), Box::new(compile(field, &format!("^(?:{pattern})$"))?))
            }
        })
    }

    fn names(&self) -> usize {
        match self {
            Self::List(names) => names.len(),
            _ => 1,
        }
    }

    fn name(&self, name: usize) -> String {
        match self {
            Self::List(names) => format!("`{}`, which no module is called", names[name]),
            Self::AllLinear => "`all-linear`, but no linear module".into(),
            Self::Whole(pattern, _) => format!("`{pattern}`, which no module's path matches"),
        }
    }

    /// Whether a path matches this name.
    fn matches(&self, name: usize, path: &str, map: MatrixId) -> bool {
        match self {
            Self::List(names) => ends_with(path, &names[name]),
            Self::AllLinear => !matches!(map, MatrixId::Layer(_, LayerRole::Router)),
            Self::Whole(_, regex) => regex.is_match(path).unwrap_or(false),
        }
    }
}

/// Patterns that are matched with ends of paths.
pub(crate) struct Compiled<T>(Vec<(Regex, T)>);

impl<T: Copy> Compiled<T> {
    pub fn new(field: &str, patterns: &Patterns<T>) -> Result<Self> {
        let compile = |(key, value): (&str, &T)| Ok((compile(field, &format!(r"^(.*\.)?({key})$"))?, *value));
        patterns.iter().map(compile).collect::<Result<_>>().map(Self)
    }

    /// The value of the first that matches.
    pub fn find(&self, path: &str) -> Option<T> {
        self.0.iter().find(|(regex, _)| regex.is_match(path).unwrap_or(false)).map(|(_, value)| *value)
    }
}

fn compile(field: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|error| Error::input(field, format!("`{pattern}`: {error}"), "a regular expression"))
}
