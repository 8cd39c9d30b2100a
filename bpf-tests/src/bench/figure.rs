//! What was measured, what it may be, and how both are shown.

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use super::stats;

/// One line of JSON.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Figure {
    /// `what/where/to whom/by whom`.
    pub(super) figure: String,
    pub(super) services: usize,
    /// A median, or a percentile where the figure says so.
    pub(super) value: Option<f64>,
    pub(super) unit: &'static str,
    /// Of plain kernel routing, of the kernel's VXLAN for what goes in VXLAN, or of the reference plugin, in the same minutes,
    /// in the same unit.
    pub(super) baseline: Option<f64>,
    /// Speed as a share of the baseline's: more is better, whatever the unit. The median over all pairs.
    pub(super) ratio: Option<f64>,
    /// Of the ratios: largest less smallest, as a share of the median.
    pub(super) spread: Option<f64>,
    pub(super) budget: Option<Limit>,
    /// Within the budget.
    pub(super) ok: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) not_measured: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Limit {
    RatioAtLeast(f64),
    ValueAtMost(f64),
}

struct Budget {
    figure: &'static str,
    limit: Limit,
}

/// Of the design, section 9.
#[rustfmt::skip]
const BUDGETS: &[Budget] = &[
    Budget { figure: "short/same-node/cluster-ip/ferroflow", limit: Limit::RatioAtLeast(0.97) },
    Budget { figure: "short/same-node/cluster-ip/ferroflow-packets", limit: Limit::RatioAtLeast(0.97) },
    Budget { figure: "short/same-node/cluster-ip/ferroflow-flat", limit: Limit::RatioAtLeast(0.97) },
    Budget { figure: "short/same-node/pod-ip/ferroflow", limit: Limit::RatioAtLeast(0.97) },
    Budget { figure: "short-p50/same-node/cluster-ip/ferroflow", limit: Limit::RatioAtLeast(0.97) },
    Budget { figure: "short-p50/same-node/cluster-ip/ferroflow-packets", limit: Limit::RatioAtLeast(0.97) },
    Budget { figure: "short-p50/same-node/cluster-ip/ferroflow-flat", limit: Limit::RatioAtLeast(0.97) },
    Budget { figure: "short-p50/same-node/pod-ip/ferroflow", limit: Limit::RatioAtLeast(0.97) },
    Budget { figure: "round-trip-p50/same-node/cluster-ip/ferroflow", limit: Limit::RatioAtLeast(0.95) },
    Budget { figure: "round-trip-p50/same-node/cluster-ip/ferroflow-packets", limit: Limit::RatioAtLeast(0.95) },
    Budget { figure: "round-trip-p50/same-node/pod-ip/ferroflow", limit: Limit::RatioAtLeast(0.95) },
    Budget { figure: "stream/same-node/cluster-ip/ferroflow", limit: Limit::RatioAtLeast(1.0) },
    Budget { figure: "stream/same-node/cluster-ip/ferroflow-packets", limit: Limit::RatioAtLeast(1.0) },
    Budget { figure: "stream/same-node/pod-ip/ferroflow", limit: Limit::RatioAtLeast(1.0) },
    Budget { figure: "short/between-nodes/pod-ip/ferroflow-vxlan", limit: Limit::RatioAtLeast(1.0) },
    Budget { figure: "short-p50/between-nodes/pod-ip/ferroflow-vxlan", limit: Limit::RatioAtLeast(1.0) },
    Budget { figure: "round-trip-p50/between-nodes/pod-ip/ferroflow-vxlan", limit: Limit::RatioAtLeast(1.0) },
    Budget { figure: "stream/between-nodes/pod-ip/ferroflow-vxlan", limit: Limit::RatioAtLeast(1.0) },
    Budget { figure: "programming/tables/ferroflow", limit: Limit::ValueAtMost(1.0) },
    Budget { figure: "change-p99/tables/ferroflow", limit: Limit::ValueAtMost(5.0) },
    Budget { figure: "change-p99/file-less-settling/ferroflow", limit: Limit::ValueAtMost(5.0) },
    Budget { figure: "cni/add-p50/ferroflow", limit: Limit::ValueAtMost(20.0) },
    Budget { figure: "policy/tables/ferroflow", limit: Limit::ValueAtMost(300.0) },
    Budget { figure: "change-p99/policy-relabel/ferroflow", limit: Limit::ValueAtMost(5.0) },
    Budget { figure: "change-p99/policy-enforced/ferroflow", limit: Limit::ValueAtMost(50.0) },
    Budget { figure: "change-p99/policy-new-peer/ferroflow", limit: Limit::ValueAtMost(50.0) },
    Budget { figure: "policy/established-packet/ferroflow", limit: Limit::ValueAtMost(100.0) },
    Budget { figure: "policy/first-packet/ferroflow", limit: Limit::ValueAtMost(400.0) },
    Budget { figure: "memory/idle/ferroflow", limit: Limit::ValueAtMost(20.0) },
    Budget { figure: "memory/in-sync/ferroflow", limit: Limit::ValueAtMost(60.0) },
    Budget { figure: "memory/after-changes/ferroflow", limit: Limit::ValueAtMost(60.0) },
];

/// The services up to which a value has a budget; ratios have theirs at every size.
const BUDGETED: usize = 10_000;

/// All figures so far; each is printed as it comes.
#[derive(Debug, Default)]
pub(super) struct Report {
    figures: Vec<Figure>,
    /// What should have been measured and could not be.
    failures: usize,
}

/// What a figure is made of.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) unit: &'static str,
    pub(super) values: Vec<f64>,
    /// Empty where there is nothing to compare with.
    pub(super) baseline: Vec<f64>,
    /// One a pair.
    pub(super) ratios: Vec<f64>,
}

impl Figure {
    fn new(figure: &str, services: usize, unit: &'static str) -> Self {
        let budget = BUDGETS.iter().find(|budget| budget.figure == figure);
        let budget = budget.filter(|budget| match budget.limit {
            Limit::RatioAtLeast(_) => true,
            Limit::ValueAtMost(_) => services <= BUDGETED,
        });
        Self {
            figure: figure.to_owned(),
            services,
            unit,
            budget: budget.map(|budget| budget.limit),
            value: None,
            baseline: None,
            ratio: None,
            spread: None,
            ok: None,
            not_measured: None,
        }
    }

    fn judged(self) -> Self {
        let ok = match self.budget {
            Some(Limit::RatioAtLeast(least)) => self.ratio.map(|ratio| ratio >= least),
            Some(Limit::ValueAtMost(most)) => self.value.map(|value| value <= most),
            None => None,
        };
        Self { ok, ..self }
    }
}

impl Report {
    pub(super) fn figures(&self) -> &[Figure] {
        &self.figures
    }

    pub(super) fn failures(&self) -> usize {
        self.failures
    }

    pub(super) fn add(&mut self, figure: &str, services: usize, measured: &Measured) -> Result<()> {
        let Measured { unit, values, baseline, ratios } = measured;
        let ratio = stats::median(ratios);
        self.push(Figure {
            value: stats::median(values),
            baseline: stats::median(baseline),
            ratio,
            spread: stats::spread(ratios),
            ..Figure::new(figure, services, unit)
        })
    }

    /// A figure without a baseline and of one measurement.
    pub(super) fn add_value(
        &mut self,
        figure: &str,
        services: usize,
        (value, unit): (f64, &'static str),
    ) -> Result<()> {
        self.push(Figure { value: Some(value), ..Figure::new(figure, services, unit) })
    }

    pub(super) fn add_ratio(&mut self, figure: &str, services: usize, ratio: f64) -> Result<()> {
        self.push(Figure { ratio: Some(ratio), ..Figure::new(figure, services, "") })
    }

    /// Not for want of a tool: something is broken.
    pub(super) fn fail(&mut self, figure: &str, services: usize, why: &anyhow::Error) -> Result<()> {
        self.failures += 1;
        eprintln!("bench: {figure} at {services} services: {why:#}");
        let why = format!("{why:#}").lines().next().unwrap_or_default().to_owned();
        self.push(Figure { not_measured: Some(why), ..Figure::new(figure, services, "") })
    }

    pub(super) fn skip(&mut self, figure: &str, services: usize, why: &str) -> Result<()> {
        self.push(Figure { not_measured: Some(why.to_owned()), ..Figure::new(figure, services, "") })
    }

    fn push(&mut self, figure: Figure) -> Result<()> {
        let figure = figure.judged();
        println!("{}", serde_json::to_string(&figure)?);
        self.figures.push(figure);
        Ok(())
    }

    /// The same as an aligned table, with a closing line.
    pub(super) fn table(&self) -> String {
        let header = ["FIGURE", "SERVICES", "VALUE", "UNIT", "BASELINE", "RATIO", "SPREAD", "BUDGET", "OK"];
        let mut rows = vec![header.map(str::to_owned)];
        rows.extend(self.figures.iter().map(row));
        let widths: [usize; 9] =
            std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
        let mut text = String::new();
        for row in &rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
                let _infallible = if column == 0 || column == 3 {
                    write!(line, "{cell:<width$}  ")
                } else {
                    write!(line, "{cell:>width$}  ")
                };
            }
            text += line.trim_end();
            text.push('\n');
        }
        let count = |wanted: fn(&Figure) -> bool| self.figures.iter().filter(|figure| wanted(figure)).count();
        let skipped = count(|figure| figure.not_measured.is_some()).saturating_sub(self.failures);
        let _infallible = writeln!(
            text,
            "bench: {} figures, {} within budget, {} over budget, {skipped} not measured, {} failed",
            self.figures.len(),
            count(|figure| figure.ok == Some(true)),
            count(|figure| figure.ok == Some(false)),
            self.failures
        );
        text
    }
}

fn row(figure: &Figure) -> [String; 9] {
    let budget = match figure.budget {
        Some(Limit::RatioAtLeast(least)) => format!("ratio >= {least:.2}"),
        Some(Limit::ValueAtMost(most)) => format!("<= {most}"),
        None => String::new(),
    };
    let value = match &figure.not_measured {
        Some(why) => format!("not measured: {why}"),
        None => figure.value.map(number).unwrap_or_default(),
    };
    [
        figure.figure.clone(),
        figure.services.to_string(),
        value,
        figure.unit.to_owned(),
        figure.baseline.map(number).unwrap_or_default(),
        figure.ratio.map(|ratio| format!("{ratio:.3}")).unwrap_or_default(),
        figure.spread.map(|spread| format!("{:.1} %", spread * 100.0)).unwrap_or_default(),
        budget,
        figure.ok.map_or("", |ok| if ok { "yes" } else { "NO" }).to_owned(),
    ]
}

/// Three digits at the least.
fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        0.001.. => format!("{value:.3}"),
        _ => format!("{value:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(ratios: &[f64]) -> Measured {
        Measured { unit: "1/s", values: vec![90.0, 110.0], baseline: vec![100.0; 3], ratios: ratios.to_vec() }
    }

    #[test]
    fn a_figure_is_judged_by_its_budget() {
        let mut report = Report::default();
        report.add("short/same-node/cluster-ip/ferroflow", 10, &measured(&[0.96, 0.98, 0.99])).unwrap();
        report.add("short/same-node/pod-ip/ferroflow", 10, &measured(&[0.9])).unwrap();
        report.add("short/same-node/cluster-ip/nftables", 10, &measured(&[0.9])).unwrap();
        report.add_value("programming/tables/ferroflow", 10, (1.5, "s")).unwrap();
        report.add_value("programming/tables/ferroflow", 50_000, (1.5, "s")).unwrap();
        let ok: Vec<_> = report.figures().iter().map(|figure| figure.ok).collect();
        assert_eq!(ok, [Some(true), Some(false), None, Some(false), None]);
        assert!(
            report.table().ends_with("5 figures, 1 within budget, 2 over budget, 0 not measured, 0 failed\n")
        );
    }

    #[test]
    fn what_is_not_measured_is_counted_and_only_a_defect_fails() {
        let mut report = Report::default();
        report.skip("short/same-node/cluster-ip/nftables", 10, "no nft").unwrap();
        assert_eq!(report.failures(), 0);
        report.fail("memory/idle/ferroflow", 10, &anyhow::anyhow!("no VmRSS\nand more")).unwrap();
        assert_eq!(report.failures(), 1);
        let table = report.table();
        assert!(table.contains("not measured: no VmRSS  "), "{table}");
        assert!(table.ends_with("0 over budget, 1 not measured, 1 failed\n"), "{table}");
    }

    #[test]
    fn a_line_of_json_names_its_budget() {
        let mut report = Report::default();
        report.add("short/same-node/cluster-ip/ferroflow", 10, &measured(&[1.0])).unwrap();
        let line = serde_json::to_string(&report.figures()[0]).unwrap();
        assert_eq!(
            line,
            r#"{"figure":"short/same-node/cluster-ip/ferroflow","services":10,"value":100.0,"unit":"1/s","#
                .to_owned()
                + r#""baseline":100.0,"ratio":1.0,"spread":0.0,"budget":{"ratio_at_least":0.97},"ok":true}"#
        );
    }
}
