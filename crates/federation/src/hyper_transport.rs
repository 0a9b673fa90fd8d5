//! The transport of real life: TLS over TCP, spoken by hyper.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, FuturesUnordered, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::HOST;
use hyper::{HeaderMap, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use protocol::id::ServerName;
use rustls::ClientConfig;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName as TlsName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower::util::BoxCloneSyncService;

use crate::discovery::{self, Discovery, Dns, Page, WELL_KNOWN_BYTES_MAX, Web};
use crate::ip_ranges::IpRanges;
use crate::transport::{Request, Response, Transport, TransportError};

/// TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The same, with finding out where the server is.
const REACH_TIMEOUT: Duration = Duration::from_secs(30);
/// Before the next address of a server is tried beside the last (RFC 8305).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);
/// A connection that was only opened to see whether somebody listens is kept this long for a request, and so many.
const OPENED_KEPT_FOR: Duration = Duration::from_secs(2);
const OPENED_MAX: usize = 64;
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const IDLE_PER_SERVER_MAX: usize = 4;
/// A pause in a body is never held against a server before this.
const BODY_PAUSE_MIN: Duration = Duration::from_secs(30);
/// Large state bodies come over one stream; the default window of 64 KiB would pace them by latency.
const H2_STREAM_WINDOW_BYTES: u32 = 4 << 20;
const H2_CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
const H2_PING_EVERY: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
pub struct TransportOptions {
    /// `false` trusts every certificate. For test networks.
    pub verify_tls: bool,
    /// PEM files of authorities trusted besides the system's.
    pub extra_ca_files: Vec<std::path::PathBuf>,
    pub ip_ranges: IpRanges,
}

#[derive(Debug, thiserror::Error)]
pub enum TransportSetupError {
    #[error("{path}: {reason}")]
    CaFile { path: String, reason: String },
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Dns(#[from] crate::dns::DnsSetupError),
}

type Connector = BoxCloneSyncService<Uri, TokioIo<Tls>, ConnectError>;

pub struct HyperTransport {
    client: Client<Connector, Full<Bytes>>,
    dialer: Dialer,
    discovery: Arc<Discovery>,
}

impl HyperTransport {
    /// With the system's resolver.
    pub fn new(options: &TransportOptions) -> Result<Self, TransportSetupError> {
        Self::with_dns(options, Arc::new(crate::dns::SystemDns::from_system()?))
    }

    pub fn with_dns(
        options: &TransportOptions,
        dns: Arc<dyn Dns>,
    ) -> Result<Self, TransportSetupError> {
        let dialer = Dialer {
            tls: TlsConnector::from(Arc::new(tls_config(options)?)),
            ranges: Arc::new(options.ip_ranges.clone()),
            opened: Arc::default(),
        };
        let web = PlainWeb {
            client: pooled(web_connector(dialer.clone(), dns.clone())),
        };
        let discovery = Arc::new(Discovery::new(dns, Arc::new(web)));
        Ok(Self {
            client: pooled(federation_connector(dialer.clone(), discovery.clone())),
            dialer,
            discovery,
        })
    }
}

impl Transport for HyperTransport {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(async move {
            let pause = request.timeout.max(BODY_PAUSE_MIN);
            let answer = tokio::time::timeout(request.timeout, self.request(request))
                .await
                .map_err(|_| TransportError::Timeout("no answer"))??;
            let (head, body) = answer.into_parts();
            Ok(Response {
                status: head.status,
                headers: head.headers,
                body: Box::pin(chunks(body, pause)),
            })
        })
    }

    fn reach(&self, to: &ServerName) -> BoxFuture<'_, Result<(), TransportError>> {
        let to = to.clone();
        Box::pin(async move {
            let reach = async {
                let authority = self.discovery.delegate(&to).await;
                let addresses = self.discovery.locate(&authority).await?;
                self.dialer.reach(addresses).await
            };
            let reached = tokio::time::timeout(REACH_TIMEOUT, reach)
                .await
                .unwrap_or(Err(ConnectError::Timeout));
            reached.map_err(|error| TransportError::Connect {
                server: to,
                reason: error.to_string(),
            })
        })
    }
}

impl HyperTransport {
    async fn request(&self, request: Request) -> Result<hyper::Response<Incoming>, TransportError> {
        let connect = |reason: String| TransportError::Connect {
            server: request.to.clone(),
            reason,
        };
        // The pool's key is the authority: the delegated name, from which the address follows. Two
        // servers that delegate to one host share its connections.
        let authority = self.discovery.delegate(&request.to).await;
        let uri: Uri = format!("https://{authority}{}", request.path_and_query)
            .parse()
            .map_err(|e| connect(format!("{e}")))?;
        let mut outgoing = hyper::Request::new(Full::new(request.body.unwrap_or_default()));
        *outgoing.method_mut() = request.method;
        *outgoing.uri_mut() = uri;
        *outgoing.headers_mut() = request.headers;
        let host = authority
            .as_str()
            .parse()
            .expect("a server name is printable ASCII");
        outgoing.headers_mut().insert(HOST, host);
        self.client.request(outgoing).await.map_err(|error| {
            if error.is_connect() {
                connect(chain(&error))
            } else {
                TransportError::Broken(chain(&error))
            }
        })
    }
}

/// A body as a stream that fails when it pauses for too long.
fn chunks(
    body: Incoming,
    pause: Duration,
) -> impl futures::Stream<Item = Result<Bytes, TransportError>> + Send {
    stream::unfold(Some(body), move |body| async move {
        let mut body = body?;
        loop {
            let frame = match tokio::time::timeout(pause, body.frame()).await {
                Err(_) => return Some((Err(TransportError::Timeout("no more of the body")), None)),
                Ok(None) => return None,
                Ok(Some(Err(error))) => {
                    return Some((Err(TransportError::Broken(chain(&error))), None));
                }
                Ok(Some(Ok(frame))) => frame,
            };
            if let Ok(data) = frame.into_data() {
                return Some((Ok(data), Some(body)));
            }
        }
    })
}

/// An error with its causes, which say what happened.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

// -- Connecting -----------------------------------------------------------------------------------

#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("not a server name")]
    BadName,
    #[error(transparent)]
    Discovery(#[from] discovery::DiscoveryError),
    #[error("every address of it is in a range that is not allowed")]
    Denied,
    #[error("connecting took too long")]
    Timeout,
    #[error("{address}: {error}")]
    Io {
        address: SocketAddr,
        error: std::io::Error,
    },
}

fn pooled(connector: Connector) -> Client<Connector, Full<Bytes>> {
    Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(IDLE_PER_SERVER_MAX)
        .http2_initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .http2_initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(H2_PING_EVERY)
        .build(connector)
}

fn federation_connector(dialer: Dialer, discovery: Arc<Discovery>) -> Connector {
    BoxCloneSyncService::new(tower::service_fn(move |uri: Uri| {
        let (dialer, discovery) = (dialer.clone(), discovery.clone());
        async move {
            let name = uri.authority().ok_or(ConnectError::BadName)?;
            let name = ServerName::parse(name.as_str()).map_err(|_| ConnectError::BadName)?;
            dialer
                .connect(name.host(), discovery.locate(&name).await?)
                .await
        }
    }))
}

fn web_connector(dialer: Dialer, dns: Arc<dyn Dns>) -> Connector {
    BoxCloneSyncService::new(tower::service_fn(move |uri: Uri| {
        let (dialer, dns) = (dialer.clone(), dns.clone());
        async move {
            let host = uri.host().ok_or(ConnectError::BadName)?;
            let found = discovery::addresses(&*dns, host, uri.port_u16().unwrap_or(443)).await?;
            dialer.connect(host, found).await
        }
    }))
}

#[derive(Clone)]
struct Dialer {
    tls: TlsConnector,
    ranges: Arc<IpRanges>,
    opened: Arc<Mutex<HashMap<SocketAddr, (Instant, TcpStream)>>>,
}

impl Dialer {
    async fn connect(
        &self,
        host: &str,
        addresses: Vec<SocketAddr>,
    ) -> Result<TokioIo<Tls>, ConnectError> {
        let name = match discovery::ip_literal(host) {
            Some(ip) => TlsName::IpAddress(ip.into()),
            None => TlsName::try_from(host.to_owned()).map_err(|_| ConnectError::BadName)?,
        };
        self.race(addresses, |address| self.dial(name.clone(), address))
            .await
    }

    /// Opens a connection to one of these, which the next request there begins with.
    async fn reach(&self, addresses: Vec<SocketAddr>) -> Result<(), ConnectError> {
        let open = async |address| Ok((address, open(address).await?));
        let (address, stream) = self.race(addresses, open).await?;
        let now = Instant::now();
        let mut opened = self.opened();
        opened.retain(|_, (since, _)| *since + OPENED_KEPT_FOR > now);
        if opened.len() < OPENED_MAX {
            opened.insert(address, (now, stream));
        }
        Ok(())
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, HashMap<SocketAddr, (Instant, TcpStream)>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tries address after address, each a little later or when the last has failed; the first that
    /// comes through wins.
    async fn race<T, F: Future<Output = Result<T, ConnectError>>>(
        &self,
        mut addresses: Vec<SocketAddr>,
        dial: impl Fn(SocketAddr) -> F,
    ) -> Result<T, ConnectError> {
        addresses.retain(|address| self.ranges.permits(address.ip()));
        let mut waiting = addresses.into_iter();
        let mut trying = FuturesUnordered::new();
        let mut failure = ConnectError::Denied;
        let first = async {
            loop {
                match waiting.next() {
                    Some(address) => trying.push(dial(address)),
                    None if trying.is_empty() => return Err(failure),
                    None => {}
                }
                let more = waiting.len() > 0;
                tokio::select! {
                    Some(tried) = trying.next() => match tried {
                        Ok(link) => return Ok(link),
                        Err(error) => failure = error,
                    },
                    () = tokio::time::sleep(NEXT_ADDRESS_AFTER), if more => {}
                }
            }
        };
        tokio::time::timeout(CONNECT_TIMEOUT, first)
            .await
            .map_err(|_| ConnectError::Timeout)?
    }

    async fn dial(
        &self,
        name: TlsName<'static>,
        address: SocketAddr,
    ) -> Result<TokioIo<Tls>, ConnectError> {
        let opened = self.opened().remove(&address);
        if let Some((since, stream)) = opened
            && since + OPENED_KEPT_FOR > Instant::now()
            && let Ok(link) = self.tls.connect(name.clone(), stream).await
        {
            return Ok(TokioIo::new(Tls(link)));
        }
        let stream = open(address).await?;
        match self.tls.connect(name, stream).await {
            Ok(link) => Ok(TokioIo::new(Tls(link))),
            Err(error) => Err(ConnectError::Io { address, error }),
        }
    }
}

async fn open(address: SocketAddr) -> Result<TcpStream, ConnectError> {
    let failed = |error| ConnectError::Io { address, error };
    let stream = TcpStream::connect(address).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    Ok(stream)
}

/// A TLS stream that tells hyper which protocol was negotiated.
struct Tls(TlsStream<TcpStream>);

impl Connection for Tls {
    fn connected(&self) -> Connected {
        let connected = Connected::new();
        if self.0.get_ref().1.alpn_protocol() == Some(b"h2") {
            connected.negotiated_h2()
        } else {
            connected
        }
    }
}

impl AsyncRead for Tls {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tls {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

// -- TLS ------------------------------------------------------------------------------------------

fn tls_config(options: &TransportOptions) -> Result<ClientConfig, TransportSetupError> {
    // Named here and not taken from the process: two crates with two defaults panic at first use.
    let provider = Arc::new(aws_lc_rs::default_provider());
    // The process's first random bytes take 25 ms, for which its first connection would wait.
    let randomness = provider.secure_random.fill(&mut [0]);
    randomness.map_err(rustls::Error::from)?;
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    let mut config = if options.verify_tls {
        let mut extra = Vec::new();
        for path in &options.extra_ca_files {
            extra.extend(read_certificates(path)?);
        }
        // Reads the system's roots, and SSL_CERT_FILE before them.
        let verifier =
            rustls_platform_verifier::Verifier::new_with_extra_roots(extra, provider.clone())?;
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth()
    } else {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TrustEveryone(provider)))
            .with_no_client_auth()
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TransportSetupError> {
    let failed = |reason: String| TransportSetupError::CaFile {
        path: path.display().to_string(),
        reason,
    };
    let found = CertificateDer::pem_file_iter(path)
        .map_err(|e| failed(e.to_string()))?
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| failed(e.to_string()))?;
    if found.is_empty() {
        return Err(failed("no certificate in it".into()));
    }
    Ok(found)
}

/// Accepts any certificate, but still checks that the server holds its key.
#[derive(Debug)]
struct TrustEveryone(Arc<CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for TrustEveryone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &TlsName<'_>,
        _ocsp_response: &[u8],
        _now: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

// -- Well-known files -----------------------------------------------------------------------------

struct PlainWeb {
    client: Client<Connector, Full<Bytes>>,
}

impl Web for PlainWeb {
    fn get<'a>(&'a self, uri: &'a Uri) -> BoxFuture<'a, Result<Page, String>> {
        Box::pin(async move {
            let answer = self.client.get(uri.clone()).await.map_err(|e| chain(&e))?;
            let text = |headers: &HeaderMap, name| {
                headers
                    .get(name)
                    .and_then(|value: &hyper::header::HeaderValue| value.to_str().ok())
                    .map(str::to_owned)
            };
            let (head, body) = answer.into_parts();
            let body = http_body_util::Limited::new(body, WELL_KNOWN_BYTES_MAX)
                .collect()
                .await
                .map_err(|e| e.to_string())?;
            Ok(Page {
                status: head.status.as_u16(),
                location: text(&head.headers, hyper::header::LOCATION),
                cache_control: text(&head.headers, hyper::header::CACHE_CONTROL),
                body: body.to_bytes().to_vec(),
            })
        })
    }
}
