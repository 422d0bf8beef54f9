// The arrow keys do in a chart what pointing at it does, and say it.
for (const chart of document.querySelectorAll("svg.chart")) {
  const bands = [...chart.querySelectorAll(".band")];
  const said = chart.parentElement.querySelector("output");
  let at = -1;
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, Home: -bands.length, End: bands.length }[event.key];
    if (!by || !bands.length) return;
    event.preventDefault();
    bands[at]?.classList.remove("on");
    at = Math.max(0, Math.min(bands.length - 1, at + by));
    bands[at].classList.add("on");
    said.textContent = [...bands[at].querySelectorAll("text")].map((line) => line.textContent).join(": ");
  });
  chart.addEventListener("blur", () => bands[at]?.classList.remove("on"));
}
