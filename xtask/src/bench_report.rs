//! What criterion measured last, as a table.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::{Result, at, root};

/// `estimates.json`, in nanoseconds per iteration.
#[derive(Deserialize)]
struct Estimates {
    mean: Estimate,
    std_dev: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
}

/// `benchmark.json`.
#[derive(Deserialize)]
struct Benchmark {
    full_id: String,
    throughput: Option<Throughput>,
}

/// What one iteration handles.
#[derive(Deserialize)]
enum Throughput {
    Bits(u64),
    Bytes(u64),
    BytesDecimal(u64),
    Elements(u64),
    ElementsAndBytes { elements: u64, bytes: u64 },
}

/// One line of the report.
#[derive(Debug, PartialEq, Serialize)]
struct Measurement {
    /// Group, function and parameter as criterion joins them.
    name: String,
    /// Seconds per iteration.
    mean_s: f64,
    /// Standard deviation of that, in seconds.
    std_dev_s: f64,
    /// Elements per second, of benches that count elements.
    #[serde(skip_serializing_if = "Option::is_none")]
    elements_per_s: Option<f64>,
    /// Bytes per second, of benches that count bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_per_s: Option<f64>,
}

/// Runs the benchmarks if asked to, and prints what criterion has on disk.
pub fn run(run_first: bool, json: bool) -> Result<()> {
    if run_first {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo).args(["bench", "--package", "moe-benches"]).current_dir(root()).status()?;
        if !status.success() {
            return Err("cargo bench --package moe-benches failed".into());
        }
    }
    let directory = criterion_directory();
    let measurements = read(&directory)?;
    if measurements.is_empty() {
        let place = directory.display();
        return Err(format!("no measurement in {place}: run `cargo xtask bench-report --run`").into());
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "benches": measurements }))?);
    } else {
        println!("{}", table(&measurements));
    }
    Ok(())
}

/// Where criterion writes, by the variables it and cargo go by.
fn criterion_directory() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match variable("CRITERION_HOME") {
        Some(home) => home,
        None => root().join(variable("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into())).join("criterion"),
    }
}

/// Every `new/` folder below a directory, by name of the benchmark. A directory that does not exist has none.
fn read(directory: &Path) -> Result<Vec<Measurement>> {
    let mut measurements = Vec::new();
    if directory.exists() {
        collect(directory, &mut measurements)?;
    }
    measurements.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(measurements)
}

fn collect(directory: &Path, into: &mut Vec<Measurement>) -> Result<()> {
    if directory.file_name().is_some_and(|name| name == "new") && directory.join("benchmark.json").exists() {
        into.push(measurement(directory)?);
        return Ok(());
    }
    for entry in fs::read_dir(directory).map_err(at(directory))? {
        let path = entry.map_err(at(directory))?.path();
        if path.is_dir() {
            collect(&path, into)?;
        }
    }
    Ok(())
}

fn measurement(directory: &Path) -> Result<Measurement> {
    let estimates: Estimates = json(&directory.join("estimates.json"))?;
    let benchmark: Benchmark = json(&directory.join("benchmark.json"))?;
    let (elements, bytes) = match benchmark.throughput {
        None => (None, None),
        Some(Throughput::Bits(bits)) => (None, Some(bits as f64 / 8.0)),
        Some(Throughput::Bytes(bytes) | Throughput::BytesDecimal(bytes)) => (None, Some(bytes as f64)),
        Some(Throughput::Elements(elements)) => (Some(elements as f64), None),
        Some(Throughput::ElementsAndBytes { elements, bytes }) => (Some(elements as f64), Some(bytes as f64)),
    };
    let mean_s = estimates.mean.point_estimate * 1e-9;
    let per_second = |amount: Option<f64>| amount.map(|amount| amount / mean_s);
    Ok(Measurement {
        name: benchmark.full_id,
        mean_s,
        std_dev_s: estimates.std_dev.point_estimate * 1e-9,
        elements_per_s: per_second(elements),
        bytes_per_s: per_second(bytes),
    })
}

fn json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(at(path))?;
    Ok(serde_json::from_str(&text).map_err(at(path))?)
}

fn table(measurements: &[Measurement]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["bench", "mean", "std dev", "throughput"]);
    for measurement in measurements {
        let rates = [(measurement.elements_per_s, "elements/s"), (measurement.bytes_per_s, "B/s")];
        let rates = rates.into_iter().filter_map(|(rate, unit)| rate.map(|rate| scaled(rate, unit)));
        let throughput = rates.collect::<Vec<_>>().join(", ");
        table.add_row([
            measurement.name.clone(),
            seconds(measurement.mean_s),
            seconds(measurement.std_dev_s),
            throughput,
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn seconds(value: f64) -> String {
    let (factor, unit) = match value {
        value if value >= 1.0 => (1.0, "s"),
        value if value >= 1e-3 => (1e3, "ms"),
        value if value >= 1e-6 => (1e6, "µs"),
        _ => (1e9, "ns"),
    };
    format!("{:.2} {unit}", value * factor)
}

/// A rate with a decimal prefix: 1 GB is 10^9 bytes.
fn scaled(rate: f64, unit: &str) -> String {
    let (factor, prefix) = match rate {
        rate if rate >= 1e9 => (1e-9, "G"),
        rate if rate >= 1e6 => (1e-6, "M"),
        rate if rate >= 1e3 => (1e-3, "k"),
        _ => (1.0, ""),
    };
    format!("{:.2} {prefix}{unit}", rate * factor)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A directory of this test process, removed at the end.
    pub struct Scratch(PathBuf);

    impl Scratch {
        pub fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("xtask-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        pub fn path(&self) -> &Path {
            &self.0
        }

        pub fn write(&self, file: &str, content: &str) {
            let path = self.0.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        /// Files of one benchmark as criterion 0.8 writes them, shortened to what varies.
        fn bench(&self, folder: &str, id: &str, throughput: &str, mean: f64) {
            let estimate = |value: f64| {
                format!(
                    r#"{{"confidence_interval":{{"confidence_level":0.95}},"point_estimate":{value},"standard_error":1.0}}"#
                )
            };
            self.write(
                &format!("{folder}/estimates.json"),
                &format!(
                    r#"{{"mean":{},"median":{},"slope":null,"std_dev":{}}}"#,
                    estimate(mean),
                    estimate(1.0),
                    estimate(mean / 10.0)
                ),
            );
            self.write(
                &format!("{folder}/benchmark.json"),
                &format!(r#"{{"group_id":"g","function_id":null,"value_str":null,"throughput":{throughput},"full_id":"{id}"}}"#),
            );
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_last_run_of_every_bench_is_reported() {
        let scratch = Scratch::new("benches");
        scratch.bench("sweep/mid/new", "sweep/mid", r#"{"Elements":512}"#, 2.5e8);
        scratch.bench("sweep/mid/base", "sweep/mid", r#"{"Elements":512}"#, 9e9);
        scratch.bench("apply/new", "apply", r#"{"Bytes":3000000000}"#, 1.5e9);
        scratch.bench("block/new", "block", "null", 1250.0);
        scratch.bench("both/new", "both", r#"{"ElementsAndBytes":{"elements":2,"bytes":8}}"#, 1e9);
        scratch.write("report/index.html", "");
        let measurements = read(scratch.path()).unwrap();
        let lines = table(&measurements).to_string();
        let cells: Vec<Vec<&str>> =
            lines.lines().map(|line| line.trim_matches('|').split('|').map(str::trim).collect()).collect();
        assert_eq!(cells[0], ["bench", "mean", "std dev", "throughput"]);
        assert_eq!(cells[2], ["apply", "1.50 s", "150.00 ms", "2.00 GB/s"]);
        assert_eq!(cells[3], ["block", "1.25 µs", "125.00 ns", ""]);
        assert_eq!(cells[4], ["both", "1.00 s", "100.00 ms", "2.00 elements/s, 8.00 B/s"]);
        assert_eq!(cells[5], ["sweep/mid", "250.00 ms", "25.00 ms", "2.05 kelements/s"]);
        assert_eq!(
            serde_json::to_value(&measurements[1]).unwrap(),
            serde_json::json!({"name": "block", "mean_s": 1250.0 * 1e-9, "std_dev_s": 125.0 * 1e-9})
        );
    }

    #[test]
    fn nothing_measured_is_nothing_read() {
        assert_eq!(read(Path::new("/nowhere/criterion")).unwrap(), []);
    }

    #[test]
    fn a_malformed_file_is_named() {
        let scratch = Scratch::new("malformed");
        scratch.bench("a/new", "a", r#"{"Furlongs":3}"#, 1.0);
        let error = read(scratch.path()).unwrap_err().to_string();
        assert!(error.contains("benchmark.json: unknown variant `Furlongs`"), "{error}");
    }
}
