//! Line charts over the number of services, as SVG: a page of text needs no crate.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};

use super::figure::Figure;

/// A chart of some figures, one line for each.
struct Chart {
    file: &'static str,
    title: &'static str,
    /// Each with the name of its line.
    lines: &'static [(&'static str, &'static str)],
}

#[rustfmt::skip]
const CHARTS: [Chart; 3] = [
    Chart { file: "short-connections.svg", title: "Short connections per second, same node", lines: &[
        ("short/same-node/pod-ip/plain-again", "plain routing"),
        ("short/same-node/cluster-ip/ferroflow", "ferroflow"),
        ("short/same-node/cluster-ip/ferroflow-packets", "ferroflow, packet path"),
        ("short/same-node/cluster-ip/nftables", "nftables"),
        ("short/same-node/cluster-ip/iptables-early", "iptables, first service"),
        ("short/same-node/cluster-ip/iptables-late", "iptables, last service"),
    ] },
    Chart { file: "programming.svg", title: "Seconds to program all services", lines: &[
        ("programming/tables/ferroflow", "ferroflow, from objects"),
        ("programming/cold-start/ferroflow", "ferroflow, from the start of the agent, YAML included"),
        ("programming/rules/nftables", "nft -f"),
        ("programming/rules/iptables", "iptables-restore"),
    ] },
    Chart { file: "memory.svg", title: "Resident memory of the agent, MB", lines: &[
        ("memory/in-sync/ferroflow", "in sync"),
        ("memory/after-changes/ferroflow", "after changes"),
    ] },
];

pub(super) fn write_all(dir: &Path, figures: &[Figure]) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    for chart in &CHARTS {
        let path = dir.join(chart.file);
        fs::write(&path, chart.svg(figures)).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

type Point = (f64, f64);

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 740.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 300.0;
/// Told apart by readers who do not see all colours (Okabe and Ito).
const COLOURS: [&str; 6] = ["#000000", "#d55e00", "#e69f00", "#0072b2", "#009e73", "#cc79a7"];

impl Chart {
    fn svg(&self, figures: &[Figure]) -> String {
        let lines: Vec<_> =
            self.lines.iter().map(|(figure, name)| (*name, points(figures, figure))).collect();
        let all = || lines.iter().flat_map(|(_, points)| points);
        let highest = all().map(|point| point.1).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
        let (least, most) =
            all().fold((f64::INFINITY, 0.0_f64), |(a, b), point| (a.min(point.0), b.max(point.0)));
        // Sizes grow by factors of ten.
        let decades = (most / least).log10().max(f64::MIN_POSITIVE);
        let x = |services: f64| LEFT + (RIGHT - LEFT) * (services / least).log10() / decades;
        let y = |value: f64| BOTTOM - (BOTTOM - TOP) * value / highest;

        let mut svg = self.frame(highest);
        for services in sizes(&lines) {
            let _infallible = writeln!(
                svg,
                r#"<text x="{:.1}" y="{}" text-anchor="middle">{services}</text>"#,
                x(services),
                BOTTOM + 18.0
            );
        }
        for (number, (name, points)) in lines.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let path: Vec<_> =
                points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
            let (column, row) = ((number % 2) as f64, (number / 2) as f64);
            let (at, line) = (LEFT + column * 330.0, BOTTOM + 50.0 + row * 20.0);
            let _infallible = writeln!(
                svg,
                r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>
<text x="{at}" y="{line}" fill="{colour}">{name}</text>"#,
                path.join(" ")
            );
            for point in points {
                let _infallible = writeln!(
                    svg,
                    r#"<circle cx="{:.1}" cy="{:.1}" r="3" fill="{colour}"/>"#,
                    x(point.0),
                    y(point.1)
                );
            }
        }
        svg + "</svg>\n"
    }

    /// Title, axes and the values at five heights.
    fn frame(&self, highest: f64) -> String {
        let mut svg = format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">
<rect width="100%" height="100%" fill="white"/>
<text x="{LEFT}" y="24" font-size="16">{} (by number of services)</text>
"#,
            self.title
        );
        for step in 0..=4 {
            let share = f64::from(step) / 4.0;
            let (y, value) = (BOTTOM - (BOTTOM - TOP) * share, highest * share);
            let digits = if highest < 10.0 { 2 } else { 0 };
            let _infallible = writeln!(
                svg,
                r##"<line x1="{LEFT}" y1="{y}" x2="{RIGHT}" y2="{y}" stroke="#cccccc"/>
<text x="{}" y="{}" text-anchor="end">{value:.digits$}</text>"##,
                LEFT - 8.0,
                y + 4.0
            );
        }
        svg
    }
}

fn points(figures: &[Figure], name: &str) -> Vec<Point> {
    let of_name = figures.iter().filter(|figure| figure.figure == name);
    of_name.filter_map(|figure| Some((figure.services as f64, figure.value?))).collect()
}

fn sizes(lines: &[(&str, Vec<Point>)]) -> Vec<f64> {
    let mut sizes: Vec<_> = lines.iter().flat_map(|(_, points)| points.iter().map(|point| point.0)).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figure::Report;

    #[test]
    fn every_figure_is_a_point() {
        let mut report = Report::default();
        for (services, value) in [(10, 20.0), (1000, 40.0)] {
            report.add_value("memory/in-sync/ferroflow", services, (value, "MB")).unwrap();
        }
        let svg = CHARTS[2].svg(report.figures());
        assert!(svg.contains(r#"<polyline points="80.0,175.0 740.0,50.0""#), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2);
    }

    #[test]
    fn a_chart_of_nothing_or_of_one_size_is_drawn() {
        let mut report = Report::default();
        assert!(CHARTS[2].svg(report.figures()).ends_with("</svg>\n"));
        report.add_value("memory/in-sync/ferroflow", 10, (20.0, "MB")).unwrap();
        let svg = CHARTS[2].svg(report.figures());
        assert!(svg.contains(r#"cx="80.0" cy="50.0""#), "{svg}");
    }
}
