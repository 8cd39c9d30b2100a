//! What is counted as it happens.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets, linear_buckets};
use prometheus_client::registry::Registry;

use super::programming::Programming;
use super::view::View;
use crate::model::{Change, Name};

/// For the one loop that the agent has; a [`Page`] shows it.
#[derive(Debug)]
pub struct Metrics {
    sync_duration: Histogram,
    last_sync: Seconds,
    last_queued: Seconds,
    services: Changes,
    slices: Changes,
    programming_duration: Histogram,
    programming: Programming,
    page: Page,
}

/// Seconds since 1970; 0 where it never was.
type Seconds = Gauge<f64, AtomicU64>;

#[derive(Debug, Default)]
struct Changes {
    total: Counter,
    pending: Gauge,
}

/// The text of all metrics.
#[derive(Clone, Debug)]
pub struct Page(Arc<Registry>);

impl Metrics {
    /// `start` is when this agent started (rule 42).
    pub fn new(start: Instant) -> Self {
        let mut registry = Registry::with_prefix("kubeproxy");
        let sync_duration = Histogram::new(exponential_buckets(0.001, 2.0, 15));
        let programming_duration = Histogram::new(
            linear_buckets(0.25, 0.25, 2)
                .chain(linear_buckets(1.0, 1.0, 59))
                .chain(linear_buckets(60.0, 5.0, 12))
                .chain(linear_buckets(120.0, 30.0, 7)),
        );
        let (last_sync, last_queued) = (Seconds::default(), Seconds::default());
        registry.register(
            "network_programming_duration_seconds",
            "From a change of endpoints in the cluster until the tables of this node say so",
            programming_duration.clone(),
        );
        let rules = registry.sub_registry_with_prefix("sync_proxy_rules");
        rules.register("duration_seconds", "How long a turn of writing took", sync_duration.clone());
        rules.register("last_timestamp_seconds", "When a turn of writing last ended", last_sync.clone());
        rules.register("last_queued_timestamp_seconds", "When a change last came", last_queued.clone());
        let services = Changes::register(rules, "service");
        let slices = Changes::register(rules, "endpoint");
        let (programming, page) = (Programming::new(start), Page(Arc::new(registry)));
        Self {
            sync_duration,
            last_sync,
            last_queued,
            services,
            slices,
            programming_duration,
            programming,
            page,
        }
    }

    pub fn page(&self) -> Page {
        self.page.clone()
    }

    /// A change came.
    pub fn changed(&self, change: &Change, now: SystemTime) {
        match change {
            Change::Service(..) => self.services.came(),
            Change::EndpointSlice(..) => self.slices.came(),
            Change::Node(..)
            | Change::Pod(..)
            | Change::ServiceCidr(..)
            | Change::KubeProxy(_)
            | Change::Namespace(..)
            | Change::NetworkPolicy(..)
            | Change::ClusterNetworkPolicy(..)
            | Change::LocalRoute(..)
            | Change::LocalAddress(..)
            | Change::LocalSubnet(..)
            | Change::Uplink { .. }
            | Change::Queue { .. }
            | Change::Tunnel(_)
            | Change::Attachment(..)
            | Change::Tenant(..)
            | Change::HostPorts(..) => {}
        }
        self.last_queued.set(seconds(now));
    }

    /// The slices of a Service are what they are since `at` (rule 42), as of `now` by both clocks.
    pub fn triggered(&mut self, service: Name, at: SystemTime, now: (SystemTime, Instant)) {
        // The clocks of two machines differ: what seems to come is of this moment.
        self.programming.triggered(service, now.0.duration_since(at).unwrap_or_default(), now.1);
    }

    /// A turn of writing ended.
    pub fn synced(&self, took: Duration, now: SystemTime) {
        self.sync_duration.observe(took.as_secs_f64());
        self.last_sync.set(seconds(now));
    }

    /// Every change that came was looked at.
    pub fn settled(&self) {
        self.services.pending.set(0);
        self.slices.pending.set(0);
    }

    /// Measures the changes whose Service is programmed by now.
    pub fn programmed(&mut self, now: Instant, is_programmed: impl Fn(&Name) -> bool) {
        for duration in self.programming.finish(now, is_programmed) {
            self.programming_duration.observe(duration.as_secs_f64());
        }
    }
}

impl Changes {
    fn register(registry: &mut Registry, of: &str) -> Self {
        let changes = Self::default();
        registry.register(
            format!("{of}_changes"),
            format!("Changes of {of}s that came"),
            changes.total.clone(),
        );
        registry.register(
            format!("{of}_changes_pending"),
            format!("Changes of {of}s that came since everything was last looked at"),
            changes.pending.clone(),
        );
        changes
    }

    fn came(&self) {
        self.total.inc();
        self.pending.inc();
    }
}

impl Page {
    /// What was counted, and what is so now.
    ///
    /// # Errors
    /// None that a `String` gives.
    pub fn text(&self, view: View) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode_registry(&mut text, &self.0)?;
        let mut registry = Registry::default();
        registry.register_collector(Box::new(view));
        encode_registry(&mut text, &registry)?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EndpointSlice, Service};

    #[test]
    fn rule_42_a_change_is_measured_when_its_service_is_programmed_and_a_deletion_is_not() {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
        let start = Instant::now();
        let steady = |seconds: u64| start + Duration::from_secs(seconds - 100);
        let mut metrics = Metrics::new(start);
        let (web, slice) = (Name::new("shop", "web"), Name::new("shop", "web-1"));
        let text = |metrics: &Metrics| metrics.page().text(View::default()).unwrap();
        metrics.changed(&Change::Service(web.clone(), Some(Service::default())), at(101));
        metrics.changed(&Change::EndpointSlice(slice.clone(), Some(EndpointSlice::default())), at(102));
        // The node's clock was a day behind until now.
        metrics.triggered(web.clone(), at(86_501), (at(86_502), steady(102)));
        metrics.synced(Duration::from_millis(3), at(103));
        metrics.programmed(steady(103), |_| false);
        let before = text(&metrics);
        assert!(before.contains("kubeproxy_network_programming_duration_seconds_count 0\n"), "{before}");
        assert!(before.contains("kubeproxy_sync_proxy_rules_service_changes_pending 1\n"), "{before}");
        metrics.synced(Duration::from_millis(3), at(104));
        metrics.settled();
        metrics.programmed(steady(104), |name| *name == web);
        metrics.changed(&Change::EndpointSlice(slice, None), at(105));
        metrics.programmed(steady(105), |_| true);
        let after = text(&metrics);
        for line in [
            "# TYPE kubeproxy_network_programming_duration_seconds histogram",
            "kubeproxy_network_programming_duration_seconds_count 1",
            "kubeproxy_network_programming_duration_seconds_sum 3.0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"2.0\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"3.0\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"300.0\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_count 2",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.002\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"16.384\"} 2",
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds 104.0",
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds 105.0",
            "# TYPE kubeproxy_sync_proxy_rules_service_changes counter",
            "kubeproxy_sync_proxy_rules_service_changes_total 1",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 1",
        ] {
            assert!(after.lines().any(|it| it == line), "no `{line}` in\n{after}");
        }
        assert!(after.ends_with("# EOF\n") && after.matches("# EOF").count() == 1);
    }
}
