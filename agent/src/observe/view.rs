//! What is so at the moment of a scrape.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ferroflow_common::verdict::DropReason;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::locality::NoLocal;
use crate::health::server::{Answered, Question};
use crate::model::Kind;

#[derive(Clone, Debug)]
pub struct View {
    /// Of the maps whose rows are known without counting them.
    pub fills: Vec<Fill>,
    /// Packets since the maps were made, over all agents.
    pub drops: Vec<(DropReason, u64)>,
    /// Entries of flows that were idle for too long, deleted by this agent.
    pub swept: u64,
    pub writes: u64,
    pub failures: u64,
    pub objects: Vec<(Kind, usize)>,
    /// Objects and documents that are refused at present.
    pub problems: u32,
    /// For how long the source has not been reached.
    pub away: Duration,
    pub started: SystemTime,
    pub no_local: NoLocal,
    pub answered: Answered,
    /// Bytes that the agent has allocated, where its allocator says.
    pub heap: Option<u64>,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    pub map: &'static str,
    pub entries: u64,
    pub capacity: u32,
}

impl Default for View {
    fn default() -> Self {
        Self {
            fills: Vec::new(),
            drops: Vec::new(),
            swept: 0,
            writes: 0,
            failures: 0,
            objects: Vec::new(),
            problems: 0,
            away: Duration::ZERO,
            started: UNIX_EPOCH,
            no_local: NoLocal::default(),
            answered: Answered::new(),
            heap: None,
        }
    }
}

impl Collector for View {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut sheet = Sheet(encoder);
        self.as_kube_proxy(&mut sheet)?;
        self.tables(&mut sheet)?;
        self.agent(&mut sheet)
    }
}

impl View {
    fn as_kube_proxy(&self, sheet: &mut Sheet<'_>) -> fmt::Result {
        let NoLocal { internal, external } = self.no_local;
        let rows = [("internal", internal), ("external", external)];
        sheet.gauges(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Services with the traffic policy Local that have endpoints, but none on this node",
            rows.map(|(policy, count)| (("traffic_policy", policy), count as u64)),
        )?;
        for (question, name, help) in [
            (Question::Healthz, "kubeproxy_proxy_healthz", "Answers of /healthz by status"),
            (Question::Livez, "kubeproxy_proxy_livez", "Answers of /livez by status"),
        ] {
            let of = self.answered.iter().filter(|((asked, _), _)| *asked == question);
            sheet.counters(
                name,
                help,
                of.map(|((_, status), count)| (("code", status.to_string()), *count)),
            )?;
        }
        Ok(())
    }

    fn tables(&self, sheet: &mut Sheet<'_>) -> fmt::Result {
        let counted = |dry_run| {
            let rows = self.drops.iter().filter(move |(reason, _)| reason.is_dry_run() == dry_run);
            rows.map(|(reason, count)| (("reason", reason.as_str()), *count))
        };
        sheet.counters("ferroflow_drops", "Packets that the programs dropped", counted(false))?;
        let help = "Packets that passed, and that policies in dry run would drop";
        sheet.counters("ferroflow_would_drop", help, counted(true))?;
        let fills = || self.fills.iter();
        sheet.gauges(
            "ferroflow_map_entries",
            "Entries of a map; of the connection tables as the last sweep left them",
            fills().map(|fill| (("map", fill.map), fill.entries)),
        )?;
        sheet.gauges(
            "ferroflow_map_capacity",
            "Entries that a map has room for",
            fills().map(|fill| (("map", fill.map), u64::from(fill.capacity))),
        )?;
        sheet.counter(
            "ferroflow_conntrack_swept",
            "Entries of expired flows that were deleted",
            self.swept,
        )?;
        sheet.counter("ferroflow_reconcile_writes", "Rows of the maps written or deleted", self.writes)?;
        sheet.counter(
            "ferroflow_reconcile_failures",
            "Times that something could not be written",
            self.failures,
        )
    }

    fn agent(&self, sheet: &mut Sheet<'_>) -> fmt::Result {
        let objects = self.objects.iter().map(|(kind, count)| (("kind", kind.name()), *count as u64));
        sheet.gauges("ferroflow_objects", "Objects that are known", objects)?;
        sheet.gauge(
            "ferroflow_problems",
            "Objects and documents that are refused",
            f64::from(self.problems),
        )?;
        let away = self.away.as_secs_f64();
        sheet.gauge("ferroflow_source_away_seconds", "How long the source of objects has been away", away)?;
        if let Some(bytes) = self.heap {
            sheet.gauge("ferroflow_heap_bytes", "Memory that the agent has allocated", bytes as f64)?;
        }
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        sheet.gauge("ferroflow_start_time_seconds", "When this agent started, since 1970", started)?;
        let version = [(("version", env!("CARGO_PKG_VERSION")), 1)];
        sheet.gauges("ferroflow_build_info", "Which agent this is", version)
    }
}

/// Takes metrics in, one name at a time.
struct Sheet<'a>(DescriptorEncoder<'a>);

impl Sheet<'_> {
    /// `name` without `_total`, which the format adds.
    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let counter = ConstCounter::new(value);
        counter.encode(self.0.encode_descriptor(name, help, None, counter.metric_type())?)
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        gauge.encode(self.0.encode_descriptor(name, help, None, gauge.metric_type())?)
    }

    fn counters<L: AsRef<str>>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = ((&'static str, L), u64)>,
    ) -> fmt::Result {
        let kind = ConstCounter::new(0_u64).metric_type();
        let mut encoder = self.0.encode_descriptor(name, help, None, kind)?;
        rows.into_iter().try_for_each(|((key, label), value)| {
            ConstCounter::new(value).encode(encoder.encode_family(&[(key, label.as_ref())])?)
        })
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = ((&'static str, &'static str), u64)>,
    ) -> fmt::Result {
        let kind = ConstGauge::new(0_u64).metric_type();
        let mut encoder = self.0.encode_descriptor(name, help, None, kind)?;
        rows.into_iter()
            .try_for_each(|(label, value)| ConstGauge::new(value).encode(encoder.encode_family(&[label])?))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::observe::Metrics;

    #[test]
    fn what_is_so_is_shown_with_its_labels() {
        let view = View {
            fills: vec![Fill { map: "frontends", entries: 3, capacity: 1_024 }],
            drops: vec![(DropReason::NoLocalEndpoint, 7)],
            swept: 5,
            objects: vec![(Kind::ServiceCidr, 2)],
            away: Duration::from_secs(9),
            no_local: NoLocal { internal: 1, external: 2 },
            answered: [((Question::Healthz, 503), 4)].into(),
            heap: Some(4_096),
            ..View::default()
        };
        let text = Metrics::new(Instant::now()).page().text(view).unwrap();
        for line in [
            "# TYPE kubeproxy_sync_proxy_rules_no_local_endpoints_total gauge",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\"} 1",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"} 2",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 4",
            "ferroflow_drops_total{reason=\"no-local-endpoint\"} 7",
            "ferroflow_map_entries{map=\"frontends\"} 3",
            "ferroflow_map_capacity{map=\"frontends\"} 1024",
            "ferroflow_conntrack_swept_total 5",
            "ferroflow_objects{kind=\"ServiceCIDR\"} 2",
            "ferroflow_source_away_seconds 9.0",
            "ferroflow_heap_bytes 4096.0",
            concat!("ferroflow_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert!(text.lines().any(|it| it == line), "no `{line}` in\n{text}");
        }
    }
}
